"""The rungs this client climbs, in order."""

from typing import Final

from nexus.services.selftest.call_rungs import (
    flood_isolation,
    loopback,
    nonce_mismatch_counted,
    peer_death_wakes,
    strict_decode,
)
from nexus.services.selftest.decision_rungs import (
    deny_reasons,
    generation,
    subject_normalization,
)
from nexus.services.selftest.device_rungs import cap_query_mmio, mmio_map
from nexus.services.selftest.end_rungs import end, no_resource_left_behind
from nexus.services.selftest.exec_rungs import (
    child_exit,
    child_exit0,
    child_exit42,
    child_exited,
    child_hello,
    crash_line,
    crash_report,
    exec_denied,
    exec_elf,
    execd_malformed,
    last_words,
    load,
    program_table,
    routing_execd,
)
from nexus.services.selftest.export_rungs import export_scrape
from nexus.services.selftest.identity_rungs import (
    cap_move_reply,
    forged_identity,
    moved_link_sender,
    sender_pid,
    sender_service_id,
)
from nexus.services.selftest.kernel_rungs import (
    cap_move_rollback,
    cap_query_vmo,
    deadline_fires,
    deadline_timeout,
    full_table_keeps_message,
    payload_roundtrip,
    qos,
)
from nexus.services.selftest.key_rungs import (
    device_key,
    device_key_persists,
    device_key_restarted,
    entries,
    export_rejected,
    nested_deadline,
    opening_read,
    routing_keystored,
)
from nexus.services.selftest.log_rungs import (
    invalid_args,
    log_query,
    over_limit,
    rate_limited,
    sink_logd,
)
from nexus.services.selftest.metric_rungs import (
    counters,
    gauges,
    histograms,
    retention,
    security_rejects,
    spans,
    wal_active,
)
from nexus.services.selftest.metric_rungs import invalid_args as metric_invalid_args
from nexus.services.selftest.metric_rungs import over_limit as metric_over_limit
from nexus.services.selftest.metric_rungs import rate_limited as metric_rate_limited
from nexus.services.selftest.policy_rungs import (
    mmio_policy_deny,
    policy_allow,
    policy_deny,
    policy_malformed,
    requester_spoof_denied,
    routing_policyd,
)
from nexus.services.selftest.random_rungs import entropy, oversized
from nexus.services.selftest.random_rungs import policy_allow as rng_policy_allow
from nexus.services.selftest.routing_rungs import rebind_generation, route_outcomes, routing
from nexus.services.selftest.rung import Rung
from nexus.services.selftest.state_rungs import (
    before_the_power_cut,
    bulk_vmo,
    corruption_quarantined,
    persist,
    persist_power_cut,
    persist_reboot,
    statefs_put,
    unauthorized_access,
)
from nexus.services.selftest.stream_rungs import core_services, hardening, stats_probe
from nexus.services.selftest.timed_rungs import timed_coalesce
from nexus.services.selftest.watch_rungs import sandbox_escape, watchdog_restart

RUNGS: Final = (
    Rung(35, opening_read, stated=True),
    Rung(37, program_table, stated=True),
    Rung(52, routing_keystored),
    Rung(53, routing_policyd),
    Rung(55, routing_execd),
    Rung(56, routing),
    Rung(57, payload_roundtrip),
    Rung(58, loopback),
    Rung(59, deadline_timeout),
    Rung(60, deadline_fires),
    Rung(61, sender_pid),
    Rung(62, sender_service_id),
    Rung(63, forged_identity),
    Rung(64, moved_link_sender),
    Rung(65, cap_move_reply),
    Rung(66, cap_move_rollback),
    Rung(67, full_table_keeps_message),
    Rung(68, peer_death_wakes),
    Rung(69, nonce_mismatch_counted),
    Rung(70, route_outcomes),
    Rung(71, rebind_generation),
    Rung(72, flood_isolation),
    Rung(73, strict_decode),
    Rung(74, nested_deadline),
    Rung(75, qos),
    Rung(76, timed_coalesce),
    Rung(77, policy_allow),
    Rung(78, policy_deny),
    Rung(79, requester_spoof_denied),
    Rung(80, policy_malformed),
    Rung(81, deny_reasons),
    Rung(82, subject_normalization),
    Rung(83, generation),
    Rung(84, load, stated=True),
    Rung(85, child_hello, stated=True),
    Rung(86, exec_elf),
    Rung(87, child_exit0, stated=True),
    Rung(88, child_exited, stated=True),
    Rung(89, child_exit),
    Rung(90, child_exit42, stated=True),
    Rung(91, crash_line, stated=True),
    Rung(92, crash_report),
    Rung(93, exec_denied),
    Rung(94, execd_malformed),
    Rung(95, sandbox_escape),
    Rung(96, watchdog_restart),
    Rung(97, rng_policy_allow, stated=True),
    Rung(98, entropy),
    Rung(99, oversized),
    Rung(100, statefs_put),
    Rung(101, unauthorized_access),
    Rung(102, bulk_vmo),
    Rung(103, persist),
    Rung(104, persist_reboot),
    Rung(105, persist_power_cut),
    Rung(106, corruption_quarantined),
    Rung(107, entries),
    Rung(108, device_key),
    Rung(109, export_rejected),
    Rung(110, device_key_restarted, stated=True, boot=0),
    Rung(110, device_key_persists),
    Rung(111, invalid_args, stated=True),
    Rung(112, over_limit, stated=True),
    Rung(113, rate_limited, stated=True),
    Rung(114, hardening),
    Rung(116, log_query),
    Rung(117, sink_logd),
    Rung(115, stats_probe),
    Rung(118, core_services),
    Rung(119, metric_invalid_args, stated=True),
    Rung(120, metric_over_limit, stated=True),
    Rung(121, metric_rate_limited, stated=True),
    Rung(122, security_rejects),
    Rung(123, counters),
    Rung(124, gauges),
    Rung(125, histograms),
    Rung(126, spans),
    Rung(127, wal_active, stated=True),
    Rung(128, retention),
    Rung(129, last_words),
    Rung(130, export_scrape),
    Rung(139, mmio_policy_deny),
    Rung(140, mmio_map),
    Rung(141, cap_query_mmio),
    Rung(142, cap_query_vmo),
    Rung(143, no_resource_left_behind, always=True),
    Rung(144, end),
    Rung(105, before_the_power_cut, stated=True, boot=1),
)

"""Where the simulated kernel's memory goes: one heap for all objects, one budget per task."""

from collections.abc import Callable
from typing import Final

from nexus.abi import (
    HEAP_SIZE,
    PAGE_SIZE,
    AbiError,
    Pid,
    Rights,
    Slot,
    Status,
)
from nexus.kernel.core import (
    LINK_END_SIZE,
    MESSAGE_SIZE,
    OBJECT_ALIGN,
    SLOT_SIZE,
    TASK_SIZE,
    TIMER_SIZE,
    WAITER_SIZE,
    Account,
    Held,
    page_round,
)
from nexus.kernel.sim.objects import Connection, KernelObject, Link, LiveViews, Port, Task, Vmo

VMO_RIGHTS: Final = Rights.MAP | Rights.MANAGE
TASK_CHARGE: Final = TASK_SIZE + WAITER_SIZE + TIMER_SIZE
CONNECTION_CHARGE: Final = 2 * LINK_END_SIZE  # one end for each direction of a port's connection


class Heap:
    """The kernel heap and what is charged to it and to the tasks' budgets.

    `on_refusal` is told about each refused request: the account and whose task it was.
    """

    __slots__ = ("account", "on_refusal")

    def __init__(self, on_refusal: Callable[[Account, Pid], None], size: int = HEAP_SIZE) -> None:
        self.account = Account("kernel heap", size)
        self.on_refusal = on_refusal

    def charge(self, task: Task, size: int, align: int = OBJECT_ALIGN) -> None:
        """Charge an object of the kernel on behalf of a task. Refuses: NoSpace."""
        try:
            self.account.charge(size, align)
        except AbiError:
            task.budget.refused_size = size
            task.budget.refused_align = align
            self.on_refusal(self.account, task.pid)
            raise

    def charge_budget(
        self, task: Task, size: int, align: int = OBJECT_ALIGN, asked: int | None = None
    ) -> None:
        """Charge an object to a task's budget. Refuses: NoSpace."""
        try:
            task.budget.charge(size, align, asked=asked)
        except AbiError:
            self.on_refusal(task.budget, task.pid)
            raise

    def refund(self, size: int) -> None:
        """Give the bytes of an object back to the heap."""
        self.account.refund(size)

    # ---- what a task's table holds

    def hold(
        self,
        task: Task,
        object_: KernelObject,
        rights: Rights,
        *,
        asked: int | None = None,
        at: Slot | None = None,
    ) -> Slot:
        """Place an object into the lowest free slot, or into `at`, and charge for it.

        Refuses: NoSpace.
        """
        if task.table.full:
            raise AbiError(Status.NO_SPACE, "every slot is used")
        align = PAGE_SIZE if isinstance(object_, Vmo) else OBJECT_ALIGN
        cost = SLOT_SIZE + self._first_cost(task, object_)
        self.charge_budget(task, cost, align, asked)
        try:
            self.charge(task, SLOT_SIZE)
        except AbiError:
            task.budget.refund(cost)
            raise
        if isinstance(object_, Vmo) and not task.table.aliases(object_):
            object_.references += 1
        if at is None:
            return task.table.set(object_, rights)
        task.table.restore(at, Held(object_, rights))
        return at

    def may_hold(self, task: Task, object_: KernelObject) -> bool:
        """Whether `hold` would succeed; a refusal by budget or heap is reported."""
        if task.table.full:
            return False
        cost = SLOT_SIZE + self._first_cost(task, object_)
        if cost <= task.budget.free and self.account.free >= SLOT_SIZE:
            return True
        account = task.budget if cost > task.budget.free else self.account
        task.budget.refused_size = cost
        task.budget.refused_align = PAGE_SIZE if isinstance(object_, Vmo) else OBJECT_ALIGN
        self.on_refusal(account, task.pid)
        return False

    def unhold(self, task: Task, slot: Slot) -> Held[KernelObject]:
        """Empty a slot and give back what it cost. The object itself lives on."""
        held = task.table.take(slot)
        object_ = held.object
        cost = SLOT_SIZE
        if not task.table.aliases(object_):
            if isinstance(object_, Vmo):
                object_.references -= 1
                if not self.is_mapped(task, object_):
                    cost += object_.cost
            else:
                cost += object_.cost
        task.budget.refund(cost)
        self.account.refund(SLOT_SIZE)
        return held

    def _first_cost(self, task: Task, object_: KernelObject) -> int:
        if task.table.aliases(object_) or id(object_) in task.maps:
            return 0
        return object_.cost

    # ---- memory objects

    def vmo_length(self, size: int) -> int:
        """The length of a memory object of that many bytes: whole pages."""
        return page_round(size)

    def create_vmo(self, task: Task, size: int) -> Slot:
        """Make a memory object. Refuses: NoSpace, with the size asked for kept."""
        self.sweep(task)
        length = self.vmo_length(size)
        if task.table.full:
            raise AbiError(Status.NO_SPACE, "every slot is used")
        if SLOT_SIZE + length > task.budget.free:
            self.charge_budget(task, SLOT_SIZE + length, PAGE_SIZE, size)
        try:
            self.account.charge(length, PAGE_SIZE, asked=size)
        except AbiError:
            task.budget.refused_size = size
            task.budget.refused_align = PAGE_SIZE
            self.on_refusal(self.account, task.pid)
            raise
        try:
            return self.hold(task, Vmo(length), VMO_RIGHTS, asked=size)
        except AbiError:
            self.account.refund(length)
            raise

    def map_vmo(self, task: Task, vmo: Vmo) -> memoryview:
        """A read-only view of a sealed object.

        The first task to map sees the object's own bytes; for another one they are copied, so
        that the views still out can be told apart by task. Sealed bytes do not change.
        """
        self.sweep(task)
        mapped = task.maps.get(id(vmo))
        if mapped is None:
            data = vmo.data if vmo.mapped_first is None else bytearray(vmo.data)
            if vmo.mapped_first is None:
                vmo.mapped_first = task
            mapped = task.maps[id(vmo)] = (vmo, data)
        assert isinstance(mapped[1], bytearray), "a sealed object is not shared"
        return memoryview(mapped[1]).toreadonly()

    def view_vmo(self, task: Task, vmo: Vmo) -> memoryview:
        """A view of a shared object that may be written, for its writer and to be narrowed."""
        self.sweep(task)
        mapped = task.maps.get(id(vmo))
        if mapped is None:
            vmo.viewers += 1
            mapped = task.maps[id(vmo)] = (vmo, LiveViews(vmo.data))
        assert isinstance(mapped[1], LiveViews), "a shared object is not sealed"
        return mapped[1].view()

    def is_mapped(self, task: Task, vmo: Vmo) -> bool:
        """Whether a view of the object is still out in this task."""
        mapped = task.maps.get(id(vmo))
        if mapped is None:
            return False
        views = mapped[1]
        if views.out if isinstance(views, LiveViews) else _has_views(views):
            return True
        del task.maps[id(vmo)]
        _unmap(task, vmo)
        return False

    def sweep(self, task: Task) -> None:
        """Give back what released views had kept: mappings whose slot was closed before."""
        for vmo, _ in list(task.maps.values()):
            if not self.is_mapped(task, vmo) and not task.table.aliases(vmo):
                task.budget.refund(vmo.cost)
                self.free_if_unused(vmo)

    def free_if_unused(self, vmo: Vmo) -> None:
        """Give a memory object's pages back if no table, message or view holds it."""
        viewed = vmo.mapped_first is not None or vmo.viewers
        if vmo.references == 0 and not viewed and not vmo.freed:
            vmo.freed = True
            self.account.refund(vmo.cost)

    def forget_maps(self, task: Task) -> None:
        """Drop a dead task's mappings: its views are gone with it."""
        for vmo, _ in list(task.maps.values()):
            _unmap(task, vmo)
            self.free_if_unused(vmo)
        task.maps.clear()

    def vmo_size(self, task: Task) -> int:
        """Bytes of memory objects a task holds, by slot or by a view still out."""
        self.sweep(task)
        held = {id(held.object): held.object for held in task.entries.values()}
        held.update((key, vmo) for key, (vmo, _) in task.maps.items())
        return sum(object_.cost for object_ in held.values() if isinstance(object_, Vmo))

    # ---- the audit

    def audit(self, tasks: list[Task]) -> int:
        """The sum of what every object reachable from these tasks costs; equals `used`."""
        total = TASK_CHARGE * len(tasks)
        vmos: dict[int, Vmo] = {}
        for task in tasks:
            ends: dict[int, Link] = {}
            total += SLOT_SIZE * task.table.used
            total += sum(endpoint.cost for endpoint in task.endpoints.values())
            total += sum(port_size(port) for port in task.ports.values())
            total += sum(device.cost for device in task.devices)
            total += LINK_END_SIZE * len(task.links)
            if task.kernel_link is not None:
                signals = task.kernel_link
                total += MESSAGE_SIZE * len(signals.queue) + signals.queued_size
            for vmo, _ in task.maps.values():
                vmos[id(vmo)] = vmo
            for held in task.entries.values():
                if isinstance(held.object, Link):
                    ends[id(held.object)] = held.object
                elif isinstance(held.object, Vmo):
                    vmos[id(held.object)] = held.object
            for link in task.links.values():
                for data, _, moved in link.queue:
                    total += MESSAGE_SIZE + len(data)
                    if moved is not None and isinstance(moved.object, Link):
                        ends[id(moved.object)] = moved.object
                    elif moved is not None and isinstance(moved.object, Vmo):
                        vmos[id(moved.object)] = moved.object
            total += LINK_END_SIZE * len(ends)
        return total + sum(vmo.cost for vmo in vmos.values() if not vmo.freed)


def connection_size(connection: Connection) -> int:
    """What a connection and everything queued in it cost the heap."""
    messages = len(connection.queue) + len(connection.outgoing)
    queued = connection.queued_size + connection.outgoing_size
    return CONNECTION_CHARGE + MESSAGE_SIZE * messages + queued


def port_size(port: Port) -> int:
    """What a port and its connections cost the heap."""
    connections = [link for link in port.links.values() if isinstance(link, Connection)]
    return port.cost + sum(connection_size(each) for each in connections)


def _unmap(task: Task, vmo: Vmo) -> None:
    if vmo.shared:
        vmo.viewers -= 1
    elif vmo.mapped_first is task:
        vmo.mapped_first = None


def _has_views(data: bytearray) -> bool:
    # A bytearray cannot be resized while a view of it is out: CPython's own count of views.
    try:
        data.append(0)
    except BufferError:
        return True
    _ = data.pop()
    return False

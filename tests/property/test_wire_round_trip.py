from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus.testing.golden import protocols
from nexus.testing.strategies import messages, reply_frames, request_frames
from nexus.wire import (
    FLAG_BATCH,
    FLAGS_INDEX,
    HEADER_SIZE,
    STATUS_OFFSET,
    Codec,
    RemoteProtocolError,
    encode,
    pack_header,
    status_of,
    unpack_header,
)

CODECS = [codec for protocol in protocols() for codec in protocol.codecs.values()]
NAMES = [codec.request_type.__qualname__ for codec in CODECS]
EXAMPLES = settings(max_examples=15)  # per codec; there are dozens of them
every_codec = pytest.mark.parametrize("codec", CODECS, ids=NAMES)


@every_codec
@EXAMPLES
@given(data=st.data())
def test_every_message_comes_back_as_it_was_sent(codec: Codec, data: st.DataObject) -> None:
    request = data.draw(messages(codec.request_type))
    reply = data.draw(messages(codec.reply_type))

    assert codec.decode_request(encode(request)) == request
    assert codec.decode_reply(encode(reply)) == reply


@every_codec
@EXAMPLES
@given(data=st.data())
def test_every_message_fits_its_computed_bound(codec: Codec, data: st.DataObject) -> None:
    request = data.draw(messages(codec.request_type))

    assert len(encode(request)) <= codec.request_size_max


@every_codec
@EXAMPLES
@given(data=st.data())
def test_every_correct_frame_is_accepted(codec: Codec, data: st.DataObject) -> None:
    request = data.draw(request_frames(codec))
    reply = data.draw(reply_frames(codec))

    if request[FLAGS_INDEX] & FLAG_BATCH:
        assert codec.decode_requests(request[HEADER_SIZE:])
        assert request[:STATUS_OFFSET] == codec.batch_prefix[:STATUS_OFFSET]
    else:
        assert encode(codec.decode_request(request[HEADER_SIZE:])) == request[HEADER_SIZE:]
        assert request.startswith(codec.prefix)
    if status_of(reply) == 0:
        assert encode(codec.decode_reply(reply[HEADER_SIZE:])) == reply[HEADER_SIZE:]
    else:
        assert codec.statuses[status_of(reply)]
    header = unpack_header(request)
    assert header is not None
    assert pack_header(header) == request[:HEADER_SIZE]


@given(body=st.binary(max_size=200), codec=st.sampled_from(CODECS))
def test_any_bytes_are_a_message_in_its_one_form_or_a_remote_protocol_error(
    body: bytes, codec: Codec
) -> None:
    for decode in (codec.decode_request, codec.decode_reply, codec.decode_requests):
        value: Any
        try:
            value = decode(body)
        except RemoteProtocolError:
            continue
        assert encode(value) == body

"""Anything at all sent to the service: what its own document allows, and files that are damaged in every way.

A bounded number by default; ``pytest -m slow`` sends thousands. No answer may be a 5xx, memory must not grow, and at
the end the service must still answer.
"""

import contextlib
import io

import numpy as np
import psutil
import pytest
import soundfile
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from media import numbered, tone, write_animation, write_sound, write_video
from serving import picture, serving
from towers import untrained

SOME, MANY = 60, 3000
"""Damaged files; and by ``-m slow``."""
PER_ROUTE, MANY_PER_ROUTE = 6, 400
"""Requests to each route from the service's own document."""
GROWTH = 64 * 2**20
"""Bytes that the process may be larger at the end, of allocators that keep what they have."""


@pytest.fixture(scope="module")
def service(tmp_path_factory, photos):
    folder = tmp_path_factory.mktemp("fuzz")
    run = untrained(folder / "clip", "image", "text", "audio", "video")
    limits = {"decode_seconds": 5.0, "pixels": 10**6, "seconds": 20.0}
    # The last name is schemathesis's.
    with serving(run, photos, index=folder / "i.arrow", hosts=("127.0.0.1", "testserver"), **limits) as one:
        yield one


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Whole files of every kind, by name."""
    folder = tmp_path_factory.mktemp("files")
    sound, frames = tone(0.3, 8000, channels=2), numbered(6, 24, 32)
    made = [write_sound(folder / f"a.{kind}", sound, 8000) for kind in ("wav", "flac", "ogg", "mp3")]
    made += [write_video(folder / f"a.{kind}", frames) for kind in ("mp4", "webm", "avi")]
    made += [write_animation(folder / "a.gif", frames)]
    found = {path.name: path.read_bytes() for path in made}
    found |= {f"a.{form.lower()}": picture(0, form=form) for form in ("PNG", "JPEG", "WEBP", "BMP", "TIFF")}
    nan = io.BytesIO()
    soundfile.write(nan, np.full(3000, np.nan, np.float32), 8000, "FLOAT", format="WAV")
    return found | {"nan.wav": nan.getvalue(), "a.txt": b"ein kurzer Text. Und noch einer."}


@st.composite
def damaged(draw, files):
    """Return (name, bytes): a whole file cut, flipped, spliced, emptied or under another name."""
    name = draw(st.sampled_from(sorted(files)))
    data = bytearray(files[name])
    for kind in draw(st.lists(st.sampled_from(["cut", "flip", "header", "splice", "repeat", "empty"]), max_size=3)):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        if kind == "cut":
            del data[at:]
        elif kind == "flip" and data:
            for _ in range(draw(st.integers(1, 20))):
                data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
        elif kind == "header" and data:
            data[min(at, 64, len(data) - 1)] = draw(st.sampled_from([0, 1, 127, 128, 255]))
        elif kind == "splice":
            data[at:at] = files[draw(st.sampled_from(sorted(files)))][: draw(st.integers(0, 4000))]
        elif kind == "repeat":
            data *= 2
        elif kind == "empty":
            data.clear()
    suffix = draw(st.sampled_from([name, *sorted(files), "", "..", "a.png/../../x", "é\u202e.png", "a" * 300]))
    return draw(st.sampled_from([name, suffix])), bytes(data)


@contextlib.contextmanager
def flat_memory():
    """Check that this process is not larger at the end."""
    before = psutil.Process().memory_info().rss
    yield
    assert psutil.Process().memory_info().rss - before < GROWTH


def send_damaged(service, files, count):
    seen = set()

    @seed(9)
    @settings(
        max_examples=count, deadline=None, database=None, derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )  # fmt: skip
    @given(upload=damaged(files), route=st.sampled_from(["/v1/zero-shot", "/v1/embed", "/v1/search"]), data=st.data())
    def check(upload, route, data):
        modality = data.draw(st.sampled_from([None, None, "image", "audio", "video"]))
        fields = {} if modality is None else {"modality": modality}
        fields |= {"classes": "cat,dog"} if route == "/v1/zero-shot" else {}
        answer = service.post(route, upload, **fields)
        seen.add(answer.status_code)
        assert answer.status_code in (200, 413, 415, 422, 400), answer.text
        assert not any(word in answer.text for word in ("/tmp", "/proc", "memfd", "mmssl-", "Traceback"))

    check()
    assert {200, 422} <= seen


def send_documented(service, count):
    """Send what the service's own document allows, and what it forbids; returns how many requests there were."""
    import schemathesis
    from schemathesis import GenerationMode
    from schemathesis.checks import CHECKS
    from schemathesis.specs.openapi import checks as conformance

    checks = [
        *CHECKS.get_by_names(["not_a_server_error"]),
        conformance.status_code_conformance,
        conformance.content_type_conformance,
        conformance.response_schema_conformance,
    ]
    schema = schemathesis.openapi.from_asgi("/openapi.json", service.app)
    done = 0
    for found in schema.get_all_operations():
        operation = found.ok()
        allowed = operation.as_strategy(generation_mode=GenerationMode.POSITIVE)
        try:
            forbidden = operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)
        except schemathesis.errors.SchemathesisError:
            forbidden = allowed  # nothing is asked that could be wrong

        @seed(9)
        @settings(
            max_examples=count, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
        )
        @given(case=st.one_of(allowed, forbidden))
        def check(case):
            nonlocal done
            case.call_and_validate(checks=checks)
            done += 1

        check()
    return done


def test_damaged_files_are_refused_and_nothing_else_suffers(service, files):
    with flat_memory():
        send_damaged(service, files, SOME)
    assert_alive(service)


def test_whatever_the_document_allows_is_answered_as_it_says(service):
    with flat_memory():
        assert send_documented(service, PER_ROUTE) >= 5 * PER_ROUTE
    assert_alive(service)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_thousands_of_damaged_files(service, files):
    send_damaged(service, files, SOME)
    with flat_memory():
        send_damaged(service, files, MANY)
    assert_alive(service)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_thousands_of_requests_from_the_document(service):
    send_documented(service, PER_ROUTE)
    with flat_memory():
        assert send_documented(service, MANY_PER_ROUTE) >= 1000
    assert_alive(service)


def assert_alive(service):
    assert service.app.in_flight == 0
    assert service.post("/v1/embed", ("a.png", picture())).status_code == 200
    assert not any(line.get("status", 0) >= 500 or "error" in line for line in service.log)
    service.lines.clear()

"""The service answers what the Python API does, and says in one sentence what is wrong with a request.

Planted bugs that fail here: another tower for the file, the worst class first, a text taken for a path, the server's
path in a search's answer, a cache of classes that does not look at the templates.
"""

import io
import json

import numpy as np
import PIL.Image
import pytest
import torch
from media import numbered, tone, write_animation, write_sound, write_video
from serving import is_problem, picture, posting, serving
from towers import untrained

from mmssl import Classifier, ZeroShotClassifier, load
from mmssl.data import inline
from mmssl.errors import UnusableData, UserError
from mmssl.objectives.classify import ClassifyConfig
from modalities.classifier import save_classifier
from modalities.encoder import Encoder, EncoderConfig, typed
from modalities.joint import joint_encoders
from tasks.search_index import SearchIndex

CLOSE = 1e-5


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return untrained(tmp_path_factory.mktemp("run") / "clip", "image", "text")


@pytest.fixture(scope="module")
def service(run):
    with serving(run) as one:
        yield one


@pytest.fixture(scope="module")
def all_towers(tmp_path_factory):
    return untrained(tmp_path_factory.mktemp("all") / "clip", "image", "text", "audio", "video")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of an encoder of pictures with a classifier on it, and of the same without."""
    torch.manual_seed(0)
    model = {"tokenizer": {"patch_size": 8}, "backbone": {"dim": 16, "depth": 1, "num_heads": 2}}
    encoder = Encoder(typed(EncoderConfig, "image", "test")(modality="image", signal={"size": (16, 16)}, model=model))
    objective = ClassifyConfig(classes=["ant", "bee", "cow"]).build({"image": encoder})
    torch.nn.init.normal_(objective.head.linear.weight, std=2)
    folder = tmp_path_factory.mktemp("alone")
    for name in ("plain", "tuned"):
        encoder.save(folder / name)
    _, head, facts = objective.kept()["image"]
    save_classifier(folder / "tuned", facts, head.state_dict())
    return folder


def same(found, expected):
    assert [one["label"] for one in found] == [one["label"] for one in expected]
    assert [one["score"] for one in found] == pytest.approx([one["score"] for one in expected], abs=CLOSE)


def decoded(data):
    return PIL.Image.open(io.BytesIO(data)).convert("RGB")


# Names


def test_zero_shot_says_what_the_python_api_says(service, run):
    data, classes = picture(1), ["red square", "blue bird", "a, b"]
    answer = service.post("/v1/zero-shot", ("x.png", data), classes=classes, templates=["photo", "so a {}"], top="2")
    assert answer.status_code == 200
    direct = ZeroShotClassifier(run, classes, ["photo", "so a {}"], cache=None)
    same(answer.json(), direct(decoded(data), top=2))
    assert answer.headers["content-type"] == "application/json"


def test_one_field_of_classes_holds_several(service):
    data = picture(1)
    several = service.post("/v1/zero-shot", ("x.png", data), classes=["cat", "dog", "big cow"]).json()
    for words in ("cat, dog,big cow", "cat\ndog\r\nbig cow\n", "cat,dog,\n,big cow"):
        assert service.post("/v1/zero-shot", ("x.png", data), classes=words).json() == several


def test_templates_are_part_of_what_is_asked(service):
    data = picture(2)
    plain, said = (
        service.post("/v1/zero-shot", ("x.png", data), classes="cat,dog", templates=templates).json()
        for templates in ([], ["what a {} this is"])
    )
    assert plain != said
    assert service.post("/v1/zero-shot", ("x.png", data), classes="cat,dog").json() == plain


def test_towers_read_the_files_of_their_kind(all_towers, tmp_path):
    sound = write_sound(tmp_path / "a.wav", tone(0.4, 8000), 8000)
    clip = write_video(tmp_path / "a.mp4", numbered(12, 32, 40), fps=10)
    gif = write_animation(tmp_path / "a.gif", numbered(6, 24, 24))
    towers = joint_encoders(all_towers)
    with serving(all_towers) as service:
        for path, modality, given in (
            (sound, "audio", {}),
            (clip, "video", {}),
            (gif, "image", {}),
            (gif, "video", {"modality": "video"}),
        ):
            answer = service.post("/v1/embed", (path.name, path.read_bytes()), **given).json()
            assert answer["modality"] == modality
            torch.testing.assert_close(
                torch.tensor(answer["vector"]), towers[modality].embed([path])[0], atol=CLOSE, rtol=0
            )
            named = service.post("/v1/zero-shot", (path.name, path.read_bytes()), classes="cat,dog", **given).json()
            same(named, ZeroShotClassifier(towers, ["cat", "dog"], modality=modality, cache=None)(path))
        # By its media type, where the name says nothing.
        answer = service.together(("POST", "/v1/embed", {"files": {"file": ("x", sound.read_bytes(), "audio/wav")}}))[0]
        assert answer.json()["modality"] == "audio"
        detail = is_problem(service.post("/v1/embed", ("a.wav", sound.read_bytes()), modality="vidio"), 422)
        assert "did you mean 'video'?" in detail


def test_a_fine_tuned_encoder_names_its_own_classes(alone, photos):
    path = next((photos / "test").rglob("*.png"))
    with serving(alone / "tuned") as service:
        answer = service.post("/v1/classify", ("a.png", path.read_bytes()), top="2")
        same(answer.json(), Classifier(alone / "tuned")(path, top=2))
        assert service.get("/v1/about").json()["routes"]["classify"] is True
        assert "embed" in is_problem(service.post("/v1/zero-shot", ("a.png", path.read_bytes()), classes="a,b"), 404)


def test_every_encoder_embeds(alone, photos):
    path = next((photos / "test").rglob("*.png"))
    with serving(alone / "plain") as service:
        answer = service.post("/v1/embed", ("a.png", path.read_bytes())).json()
        vector = load(alone / "plain").embed([path])[0]
        torch.testing.assert_close(torch.tensor(answer["vector"]), vector, atol=CLOSE, rtol=0)
        assert answer["dim"] == len(vector)
        is_problem(service.post("/v1/classify", ("a.png", path.read_bytes())), 404)
        is_problem(service.post("/v1/zero-shot", ("a.png", path.read_bytes()), classes="a,b"), 404)
        assert "no texts" in is_problem(service.post("/v1/embed", text="a cat"), 422)


def test_texts_are_words_and_never_paths(service, run, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("a red square on a table")
    tower = joint_encoders(run)["text"]
    for text in (str(secret), f"data:,{secret}", "data:,a%20b", "a red square on a table"):
        vector = torch.tensor(service.post("/v1/embed", text=text).json()["vector"])
        torch.testing.assert_close(vector, tower.embed([inline.join(text)])[0], atol=CLOSE, rtol=0)
    direct = ZeroShotClassifier(run, [str(secret), "b"], cache=None)
    answer = service.post("/v1/zero-shot", ("x.png", picture(0)), classes=[str(secret), "b"])
    same(answer.json(), direct(decoded(picture(0))))


# What is wrong with a request


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "'classes' is missing"),
        ({"classes": "cat"}, "the only class"),
        ({"classes": "cat,cat"}, "given twice"),
        ({"classes": " , "}, "no class is given"),
        ({"classes": "cat,dog", "templates": "photp"}, "did you mean 'photo'?"),
        ({"classes": "cat,dog", "templates": "a {} of {}"}, "does 2 times"),
        ({"classes": "cat,dog", "top": "0"}, "top"),
        ({"classes": "cat,dog", "top": "many"}, "top"),
        ({"classes": "cat,dog", "top": ["1", "2"]}, "2 times"),
        ({"classes": "cat,dog", "clases": "x"}, "did you mean 'classes'?"),
        ({"classes": "cat,dog", "modality": "audio"}, "image"),
    ],
)
def test_mistakes_get_one_sentence(service, fields, words):
    assert words in is_problem(service.post("/v1/zero-shot", ("x.png", picture()), **fields), 422)


def test_a_form_needs_its_file_and_one_alone(service):
    assert "no file" in is_problem(service.post("/v1/zero-shot", classes="cat,dog"), 422)
    two = [("file", ("a.png", picture())), ("file", ("b.png", picture())), ("classes", (None, "a,b"))]
    is_problem(service.together(("POST", "/v1/zero-shot", {"files": two}))[0], 400)
    assert "'file'" in is_problem(
        service.together(("POST", "/v1/embed", {"files": {"image": ("a.png", picture())}}))[0], 422
    )
    assert "not both" in is_problem(service.post("/v1/embed", ("a.png", picture()), text="a"), 422)
    assert "filename" in is_problem(service.together(("POST", "/v1/embed", {"files": {"file": (None, "x")}}))[0], 422)
    assert "'nothing' is not a field; valid: file, modality, text" in is_problem(service.post("/v1/embed"), 422)
    nothing = {"content": b"--b--\r\n", "headers": {"Content-Type": "multipart/form-data; boundary=b"}}
    assert "a file or a text" in is_problem(service.ask("POST", "/v1/embed", **nothing), 422)
    is_problem(service.post("/v1/embed", text=" "), 422)


def test_other_bodies_are_refused(service):
    is_problem(service.ask("POST", "/v1/embed", json={"text": "a"}), 415)
    is_problem(service.ask("POST", "/v1/embed"), 415)
    for more in ("", "; boundary=", "; boundary=b"):
        headers = {"Content-Type": f"multipart/form-data{more}"}
        for body in (b"", b"--b\r\n", b"nonsense", b"--b\r\nContent-Disposition: x\r\n\r\n\r\n--b--\r\n"):
            answer = service.ask("POST", "/v1/embed", content=body, headers=headers)
            is_problem(answer, answer.status_code)
            assert answer.status_code in (400, 422)


def test_other_addresses_and_methods_are_refused(service):
    for path in ("/nothing", "/assets/..%2f..%2fserve.py", "/assets/index.html"):
        assert "nothing here" in is_problem(service.get(path), 404)
    assert "takes POST" in is_problem(service.get("/v1/embed"), 405)
    assert "takes GET" in is_problem(service.ask("DELETE", "/healthz"), 405)


def test_an_error_of_ours_is_told_as_ours_and_logged(service, monkeypatch):
    monkeypatch.setattr(type(service.models), "tower", lambda *_: 1 / 0)
    detail = is_problem(service.post("/v1/embed", ("x.png", picture())), 500)
    assert "ZeroDivision" not in detail
    assert any("ZeroDivisionError" in line.get("error", "") for line in service.log)


# Search


@pytest.fixture(scope="module")
def searched(run, photos, tmp_path_factory):
    with serving(run, data=photos, index=tmp_path_factory.mktemp("index") / "i.arrow") as one:
        yield one


def test_search_finds_what_the_index_finds_and_names_no_path_of_the_server(searched, run, photos, tmp_path):
    index = SearchIndex(run, photos, tmp_path / "i.arrow")
    index.refresh(workers=0)
    example = next((photos / "test").rglob("*.png"))
    for answer, expected in (
        (searched.post("/v1/search", text="a red square", top="5"), index.search("a red square", 5)),
        (searched.post("/v1/search", (example.name, example.read_bytes()), top="5"), index.search(like=example, top=5)),
    ):
        hits = answer.json()
        assert [hit["name"] for hit in hits] == [index.name(one["path"]) for one in expected]
        assert [hit["score"] for hit in hits] == pytest.approx([one["score"] for one in expected], abs=CLOSE)
        assert str(photos) not in answer.text
    assert hits[0]["name"] == str(example.relative_to(photos))


def test_what_was_found_can_be_looked_at_and_nothing_else(searched, photos):
    hit = searched.post("/v1/search", text="a red square", top="1").json()[0]
    answer = searched.get(f"/v1/media/{hit['id']}")
    assert answer.headers["content-type"] == "image/jpeg"
    shown = PIL.Image.open(io.BytesIO(answer.content))
    own = PIL.Image.open(photos / hit["name"])
    assert shown.size == own.size
    assert np.abs(np.asarray(shown.convert("RGB"), float) - np.asarray(own.convert("RGB"), float)).mean() < 20
    for other in (hit["name"], "0" * 24, "..%2f..%2fetc%2fpasswd", hit["id"][:-1]):
        is_problem(searched.get(f"/v1/media/{other}"), 404)


def test_a_file_that_has_gone_is_told_without_its_path(run, tmp_path):
    folder = tmp_path / "private" / "album"
    folder.mkdir(parents=True)
    for i in range(3):
        (folder / f"{i}.png").write_bytes(picture(i))
    with serving(run, data=folder, index=tmp_path / "i.arrow") as service:
        hit = service.post("/v1/search", text="a", top="1").json()[0]
        for name in ("0.png", "1.png", "2.png"):  # a name is no id
            is_problem(service.get(f"/v1/media/{name}"), 404)
        (folder / hit["name"]).unlink()
        answer = service.get(f"/v1/media/{hit['id']}")
        is_problem(answer, 404)
        assert "private" not in answer.text + service.get("/v1/about").text


def test_files_outside_of_the_folder_are_called_by_their_own_name(run, tmp_path):
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "a.png").write_bytes(picture(0))
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "manifest.csv").write_text(f"path\n{tmp_path / 'private' / 'a.png'}\n")
    with serving(run, data=tmp_path / "list", index=tmp_path / "i.arrow") as service:
        answer = service.post("/v1/search", text="a")
        assert [hit["name"] for hit in answer.json()] == ["a.png"]
        assert "private" not in answer.text


@pytest.mark.parametrize("modality", ["audio", "video"])
def test_sounds_and_videos_are_shown_as_pictures(all_towers, modality, sounds, clips, tmp_path):
    with serving(all_towers, data={"audio": sounds, "video": clips}[modality], index=tmp_path / "i.arrow") as service:
        hit = service.post("/v1/search", text="a").json()[0]
        shown = PIL.Image.open(io.BytesIO(service.get(f"/v1/media/{hit['id']}").content)).convert("L")
        assert np.asarray(shown).std() > 10


def test_nothing_to_search_in_is_a_problem(service):
    assert "--data" in is_problem(service.post("/v1/search", text="a"), 404)
    is_problem(service.get("/v1/media/abc"), 404)


def test_an_index_that_is_not_there_is_told_before_anything_is_served(run, photos, tmp_path):
    from tasks.serve_limits import Limits
    from tasks.serve_search import Search

    with pytest.raises(UserError, match="refresh it first"):
        Search(SearchIndex(run, photos, tmp_path / "i.arrow"), Limits())
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_text("no picture")
    index = SearchIndex(run, tmp_path / "bad", tmp_path / "i.arrow")
    index.refresh(workers=0)
    with pytest.raises(UnusableData, match="none of the 1"):
        Search(index, Limits())


# What it says of itself


def test_about_health_and_metrics(service):
    assert service.get("/healthz").json() == {"status": "ok"}
    about = service.get("/v1/about").json()
    assert about["modalities"] == ["image", "text"]
    assert about["routes"] == {"zero-shot": True, "classify": False, "embed": True, "search": False}
    assert ".png" in about["files"]
    text = service.get("/metrics").text
    assert 'mmssl_requests_total{route="/healthz",status="200"}' in text
    assert "mmssl_batch_size_bucket" in text


def test_pages_and_their_parts_are_there_and_come_from_here(service):
    for path, kind in (("/", "text/html"), ("/docs", "text/html"), ("/assets/page.js", "text/javascript"),
                       ("/assets/docs.js", "text/javascript"), ("/assets/style.css", "text/css")):  # fmt: skip
        answer = service.get(path)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(kind)
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "//" not in answer.text.replace("// ", "")


def test_the_openapi_document_describes_every_route(service):
    document = service.get("/openapi.json").json()
    assert set(document["paths"]) == {
        "/healthz", "/metrics", "/v1/about", "/v1/zero-shot", "/v1/classify", "/v1/embed", "/v1/search",
        "/v1/media/{id}",
    }  # fmt: skip
    for path in document["paths"].values():
        for route in path.values():
            assert route["description"]
            assert "application/problem+json" in route["responses"]["429"]["content"]
    assert list(document["paths"]["/metrics"]["get"]["responses"]["200"]["content"]) == ["text/plain"]
    assert "securitySchemes" not in document["components"]
    form = document["paths"]["/v1/zero-shot"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert form["required"] == ["file", "classes"]


def test_the_log_tells_no_names_and_no_words(run):
    with serving(run, token="sesame-open") as service:
        own = {"Authorization": "Bearer sesame-open"}
        service.together(posting("/v1/embed", ("private name.png", picture()), headers=own))
        service.together(posting("/v1/embed", headers=own, text="private words"), ("GET", "/private/path", {}))
        service.get("/v1/about?private=1", headers={"Authorization": "Bearer private-token"})
        text = "\n".join(service.lines)
        assert "private" not in text
        assert "sesame" not in text
        assert (service.log[0]["route"], service.log[0]["status"]) == ("/v1/embed", 200)
        assert set(service.log[0]) == {"time", "id", "method", "route", "status", "ms", "bytes", "sent"}
        assert sorted(line["status"] for line in service.log) == [200, 200, 401, 404]
        assert json.dumps(service.log[0])

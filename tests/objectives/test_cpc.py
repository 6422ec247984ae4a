"""CPC: what it is made of, that it learns what can be known and nothing else, and what it refuses."""

import csv
import json

import pytest
import torch
from media import tone, write_sound
from predictors import roused

from mmssl.data.dataset import Plan, Samples, Stream, loader
from mmssl.data.listing import list_files
from mmssl.distributed import World
from mmssl.errors import UserError
from mmssl.objectives import cpc
from mmssl.objectives.cpc import CPC, lines, turn
from modalities.encoder import MODALITIES
from tasks.batches import make_buckets
from tasks.build import as_objective, build_objective, load_recipe
from tasks.cli import main
from tasks.pretrain import pretrain

RATE, HOP, SAMPLES = 8000, 40, 1280
TINY = {
    "signal.sample_rate": RATE, "signal.seconds": SAMPLES / RATE,
    "model.tokenizer.kernels": [10, 8, 4], "model.tokenizer.strides": [5, 4, 2],
    "model.backbone.dim": 16, "objective.steps": 3, "objective.negatives.count": 32,
    "train.batch_size": 4, "train.steps": 3, "train.log_every": 1, "data.workers": 0,
}  # fmt: skip
FREE = 2
"""Steps to skip: a token sees 105 samples, so that from the third on it shares none with what predicts it."""


def make(rouse=True, **changes) -> CPC:
    objective = build_objective(load_recipe("cpc-audio-tiny", TINY | changes))
    return roused(objective) if rouse else objective


def batch_of(count=4, **more):
    return {"signal": torch.randn(count, 1, SAMPLES), "seed": torch.arange(count), **more}


def inside(z, edge):
    """Return what is predicted and what it is told from: all but the tokens that see zeros before the signal."""
    return (torch.arange(z.shape[1]) >= edge).expand(z.shape[:2])


@pytest.mark.parametrize("backbone", ["gru", "lstm", "causal"])
def test_it_is_the_heads_loss_of_tokens_and_contexts(backbone):
    objective, batch = make(**{"model.backbone.name": backbone}), batch_of()
    loss, metrics = objective(batch)
    tokenizer, context = objective.encoder.tokenizer, objective.encoder.backbone
    z = tokenizer.embed(tokenizer.patches(batch))
    wanted, report = objective.heads[0](z, context(z), batch["seed"], inside(z, tokenizer.edge))
    assert torch.equal(loss, wanted)
    assert metrics == report
    wanted = {f"{what}_{k}" for what in ("accuracy", "bound") for k in (1, 2, 3)} | {"bound", "log_n", "trivial"}
    assert set(metrics) == wanted
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in objective.parameters())


def test_directions_have_a_context_and_a_head_each_and_backward_is_time_turned_round():
    objective, batch = make(**{"objective.directions": ["forward", "backward"]}), batch_of()
    tokenizer = objective.encoder.tokenizer
    z = tokenizer.embed(tokenizer.patches(batch))
    (context,) = objective.contexts
    present = inside(z, tokenizer.edge)
    there = objective.heads[0](z, objective.encoder.backbone(z), batch["seed"], present)
    back = objective.heads[1](z.flip(1), context(z.flip(1)), batch["seed"], present.flip(1))
    loss, metrics = objective(batch)
    torch.testing.assert_close(loss, (there.loss + back.loss) / 2)
    torch.testing.assert_close(metrics["bound_2"], (there.metrics["bound_2"] + back.metrics["bound_2"]) / 2)
    kept = dict(objective.encoders()["audio"].named_parameters())
    assert not any(parameter is other for parameter in context.parameters() for other in kept.values())


def test_lines_lead_down_rows_up_and_over_columns():
    x = torch.arange(6).view(1, 6, 1)  # 2 rows, 3 columns
    found = {d: turn(x, (2, 3), d).flatten().tolist() for d in ("forward", "backward", "right", "left")}
    assert found["forward"] == [0, 1, 2, 3, 4, 5]
    assert found["backward"] == [3, 4, 5, 0, 1, 2]
    assert found["right"] == [0, 3, 1, 4, 2, 5]
    assert found["left"] == [2, 5, 1, 4, 0, 3]
    assert lines(turn(x, (2, 3), "left"), (3, 2))[0, 1].flatten().tolist() == [5, 4, 3]


def test_other_looks_at_a_file_are_no_negatives_without_the_current_one():
    objective = make(**{"objective.negatives.current": False})
    batch = batch_of()
    alike = objective(batch | {"index": torch.full((4,), 9)})
    assert alike.loss == alike.metrics["log_n"] == 0
    assert objective(batch | {"index": torch.tensor([9, 8, 9, 8])}).metrics["log_n"] > 0
    assert torch.equal(objective(batch | {"index": torch.arange(4) + 5}).loss, objective(batch).loss)


@pytest.mark.parametrize(("tokens", "steps", "direction"), [(2, 1, "forward"), (4, 2, "backward")])
def test_a_signal_of_edge_alone_is_told(tokens, steps, direction):
    changes = {"objective.steps": steps, "objective.directions": [direction]}
    make(**{"signal.seconds": (tokens + 1) * HOP / RATE, "signal.hop_ms": 1, "signal.window_ms": 2, **changes})
    with pytest.raises(UserError, match=r"the first 2 see zeros .* raise signal\.seconds, or for texts signal\.bytes"):
        make(**{"signal.seconds": tokens * HOP / RATE, "signal.hop_ms": 1, "signal.window_ms": 2, **changes})


def test_padding_changes_nothing():
    objective = make()
    batch = batch_of(length=torch.tensor([SAMPLES, 700, 300, 39]))
    loss, metrics = objective(batch)
    noisy = batch["signal"].clone()
    for row, length in zip(noisy, batch["length"].tolist(), strict=True):
        row[:, max(length, HOP) :] = torch.randn_like(row[:, max(length, HOP) :])
    changed, report = objective(batch | {"signal": noisy})
    assert torch.equal(changed, loss)
    assert report == metrics
    assert not torch.equal(objective(batch_of())[0], loss)


def test_the_same_bits_every_time_and_other_negatives_for_other_seeds():
    batch = batch_of()
    found = []
    for _ in range(2):
        objective = make()
        objective(batch).loss.backward()
        found.append([p.grad for p in objective.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not torch.equal(objective(batch | {"seed": torch.arange(4) + 9}).loss, objective(batch).loss)


@pytest.mark.parametrize("changes", [
    {}, {"model.backbone.name": "causal", "model.backbone.input_dim": 12}, {"objective.predictor": "transformer"},
], ids=str)  # fmt: skip
def test_bf16_is_close(changes):
    objective, batch = make(**changes), batch_of()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = objective(batch)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, objective(batch).loss, atol=1e-2, rtol=0)
    loss.backward()


# --- learning ---------------------------------------------------------------------------------------------------------


def tones(generator, count):
    """A tone per sample, of any pitch, phase and loudness: from a few periods on, all that comes is known."""
    pitch, phase, gain = torch.rand(3, count, 1, generator=generator)
    return (0.3 + gain) * torch.sin(torch.arange(SAMPLES) * (0.05 + pitch) + 6.3 * phase)


def noise(generator, count):
    return torch.randn(count, SAMPLES, generator=generator)


def learn(sounds, steps=60):
    """Train on fresh sounds; return the metrics on sounds that are fresh again, the mean over 8 batches."""
    objective = make(rouse=False, **{"objective.skip": FREE})
    optimizer, generator = torch.optim.Adam(objective.parameters(), 6e-3), torch.Generator().manual_seed(1)

    def batch(step):
        return {"signal": sounds(generator, 16).unsqueeze(1), "seed": torch.arange(16) + 16 * step}

    for step in range(steps):
        optimizer.zero_grad()
        objective(batch(step)).loss.backward()
        optimizer.step()
    with torch.no_grad():
        found = [objective(batch(step)).metrics for step in range(steps, steps + 8)]
    return {name: float(sum(metrics[name] for metrics in found)) / 8 for name in found[0]}


def test_it_learns_what_the_past_tells():
    metrics = learn(tones)
    assert metrics["accuracy_3"] > 5 / 33
    assert 1 < metrics["bound_3"] <= metrics["log_n"]


def test_nothing_is_known_of_fresh_noise():
    # Tokens that see the zeros before a sound, were they candidates, would be known at a glance: 0.06 nats here.
    metrics = learn(noise)
    for k in (3, 4, 5):
        assert metrics[f"accuracy_{k}"] < 1.4 / 33
        assert metrics[f"bound_{k}"] < 0.01


# --- batches of one speaker -------------------------------------------------------------------------------------------


@pytest.fixture
def spoken(tmp_path):
    """Write sounds of the speakers given, and a manifest of them."""

    def write(speakers, column="speaker"):
        folder = tmp_path / "spoken"
        folder.mkdir()
        with (folder / "manifest.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["path", column])
            for i, speaker in enumerate(speakers):
                write_sound(folder / f"{i}.wav", tone(0.2, RATE, 200 + 50 * i), RATE)
                rows.writerow([f"{i}.wav", speaker])
        return folder

    return write


def test_batches_of_one_speaker(spoken):
    speakers = ["ann", "bob", "ann", "cy", "ann", "bob", "ann", "ann"]
    kind = MODALITIES["audio"]
    listing = list_files(spoken(speakers), kind)
    recipe = load_recipe("cpc-audio-tiny", {**TINY, "objective.negatives.source": "speaker", "data.repeats": 2})
    objective = as_objective(build_objective(recipe))
    buckets = make_buckets(recipe, listing, objective.encoders()["audio"].tokenizer)
    samples = Samples(listing.paths, kind.views(recipe.signal), buckets, objective.draw(), 0, 30.0)
    steps, seen = 16, []
    for rank in range(2):
        streams = [Stream(bucket.members, 0, b, 2) for b, bucket in enumerate(buckets)]
        plan = Plan(streams, 8, 1, World(rank, 2), 0, steps)
        seen.append([batch["index"].tolist() for batch, _ in loader(samples, plan, 0, pin=False)])
    turns = []
    for one, two in zip(*seen, strict=True):
        (speaker,) = {speakers[i] for i in one + two}
        turns.append(speaker)
    assert {i for indices in seen for batch in indices for i in batch} == set(range(8))
    assert {name: turns.count(name) for name in set(speakers)} == {"ann": 10, "bob": 4, "cy": 2}


def test_another_column_can_tell(spoken, tmp_path):
    settings = {**TINY, "objective.negatives": {"source": "speaker", "column": "room", "count": 8}}
    result = pretrain("cpc-audio-tiny", spoken(["a", "b"] * 4, "room"), tmp_path / "run", settings)
    assert result.steps == 3


SPEAKER = "objective.negatives.source=speaker"


@pytest.mark.parametrize(("speakers", "column", "words"), [
    (["a", "b"], "speakre", "the manifest has no 'speaker' column; did you mean 'speakre'?"),
    (["a", "", "b"], "speaker", "row 2 (1.wav) has no speaker"),
    (None, "", "column 'speaker' was asked for, but there is no manifest to hold it"),
])  # fmt: skip
def test_files_that_do_not_tell_their_speaker_are_a_sentence(spoken, sounds, tmp_path, capfd, speakers, column, words):
    folder = sounds if speakers is None else spoken(speakers, column)
    assert words in refused(capfd, "cpc-audio-tiny", folder, tmp_path / "run", *TINY_WORDS, SPEAKER)


# --- refusals and warnings --------------------------------------------------------------------------------------------

TINY_WORDS = [f"{key}={value}" for key, value in TINY.items()]


def refused(capfd, recipe, data, out, *words):
    """Return the one sentence that a run is refused with."""
    assert main(["pretrain", str(recipe), "--data", str(data), "--out", str(out), *words]) == 2
    said = capfd.readouterr().err
    assert len(said.splitlines()) == 1
    return said


@pytest.mark.parametrize(("words", "sentence"), [
    (["objective.steps=33"], "objective.steps 33 and skip 0 reach 33 ahead, but the token grid [32] has 32"),
    (["objective.steps=30", "objective.skip=2"], "objective.steps 30 and skip 2 reach 32 ahead"),
    (["model.cls_token=true"], "with backbone 'gru' and output 'context' set model.cls_token=false"),
    (["model.backbone={name: vit, dim: 16, num_heads: 2}"], "model.backbone.name to gru, lstm or causal"),
    (["model.backbone={name: pixelcnn, dim: 16}"], "'pixelcnn' needs rows and columns, but tokens are a sequence"),
    (["objective.directions=[right]"], "'right' needs rows and columns, but tokens are a sequence"),
    (["objective.directions=[forward, forward]"], "needs at least one direction and none twice"),
    (["objective.predictor=transformer", "model.backbone.dim=15", "model.backbone.input_dim=16"], "an even width"),
    (["objective.negatives={source: sequence, current: false}"], "so current must be true"),
])  # fmt: skip
def test_what_cannot_be_is_a_sentence(capfd, sounds, tmp_path, words, sentence):
    assert sentence in refused(capfd, "cpc-audio-tiny", sounds, tmp_path / "run", *TINY_WORDS, *words)


def test_masks_want_patches_apart_and_cpc_tokens_without_places(capfd, sounds, tmp_path):
    for mistaken, other, words in (
        ("cpc-audio-tiny", "audio-mae-tiny", "masked autoencoding needs patches that do not overlap"),
        ("audio-mae-tiny", "cpc-audio-tiny", "positions in the tokens would give away: take a model.tokenizer.name"),
    ):
        recipe = load_recipe(mistaken).as_dict() | {"objective": load_recipe(other).as_dict()["objective"]}
        path = tmp_path / f"{mistaken}.yaml"
        path.write_text(json.dumps(recipe))
        assert words in refused(capfd, path, sounds, tmp_path / "run")


def test_a_saturated_bound_is_told_once(monkeypatch, capfd, sounds, tmp_path):
    monkeypatch.setattr(cpc, "SATURATED", -99.0)
    pretrain("cpc-audio-tiny", sounds, tmp_path / "run", TINY)
    assert capfd.readouterr().err.count("is close to log N") == 1


def test_what_a_warning_is_given_for():
    objective = make()
    assert objective.warning({"bound": 1.0, "log_n": 3.0}) is None
    said = objective.warning({"bound": 2.9, "log_n": 3.0})
    assert "2.90 nats, is close to log N = 3.00" in said
    assert "nothing is learned" in objective.warning({"bound": 0.0, "log_n": 0.0})


def test_compiling_changes_nothing_but_rounding(monkeypatch, sounds, tmp_path):
    compiled, compile = [], torch.nn.Module.compile

    def recording(self):
        compiled.append(type(self).__name__)
        compile(self, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", recording)
    plain, fast = (
        pretrain("cpc-audio-tiny", sounds, tmp_path / str(on), {**TINY, "train.steps": 2, "train.compile": on})
        for on in (False, True)
    )
    assert compiled == ["CPC"]
    assert fast.loss == pytest.approx(plain.loss, abs=1e-5)

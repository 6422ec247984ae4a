"""CPC on sentences: it learns what follows from what, and nothing where nothing follows; from files to a prediction."""

import itertools
import json

import numpy as np
import pytest
import torch
from predictors import roused

from mmssl.objectives.cpc import CPCConfig, turn
from modalities import text
from modalities.encoder import Encoder, EncoderConfig, typed
from tasks.cli import main

SIGNAL = {"sentences": 6, "length": 16}
SENTENCES = ["".join(pair) + " is " + pair[1] + "." for pair in itertools.product("abcdefg", "uvwxyz")]
"""42 sentences. In their own order a sentence tells the next one; most bytes of it are those of many others."""


def objective(count=15, **settings):
    torch.manual_seed(0)
    model = {
        "tokenizer": {"embed_dim": 16, "kernel": 5},
        "backbone": {"name": "gru", "dim": 32},
        "cls_token": False,
        "output": "latent",
    }
    encoder = Encoder(typed(EncoderConfig, "text", "test")(modality="text", signal=SIGNAL, model=model))
    return CPCConfig(steps=2, negatives={"count": count}, **settings).build({"text": encoder})


def batch(rng, order, size=16):
    """Return passages that begin anywhere and go on in an order, or each in one of its own, where it is None."""
    rows = []
    for _ in range(size):
        own, start = rng.permutation(len(SENTENCES)) if order is None else order, rng.integers(len(SENTENCES))
        chosen = [SENTENCES[i].encode() for i in np.roll(own, -start)[: SIGNAL["sentences"]]]
        rows.append(text._filled(chosen, (SIGNAL["sentences"], SIGNAL["length"])))
    return {"signal": torch.stack(rows).unsqueeze(1), "seed": torch.from_numpy(rng.integers(2**62, size=size))}


def learned(order, steps=120):
    """Return the metrics on fresh passages after training on others."""
    model, rng = objective(), np.random.default_rng(0)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(batch(rng, order)).loss.backward()
        optimizer.step()
    with torch.no_grad():
        return {name: float(value) for name, value in model.eval()(batch(rng, order, 64)).metrics.items()}


def test_it_learns_what_follows_and_nothing_where_nothing_does():
    found = learned(np.random.default_rng(1).permutation(len(SENTENCES)))
    assert found["bound"] > 1.8  # of log 16 = 2.77
    # Among 15 others is the very sentence in 3 of 10 cases, which counts as a miss.
    assert found["accuracy_1"] > 0.5
    shuffled = learned(None)
    assert shuffled["bound"] < 0.1
    assert shuffled["accuracy_1"] < 0.15


def test_sentences_that_are_not_there_are_neither_predicted_nor_negatives():
    # Of all candidates, for which are drawn depends on how many places there are.
    model, full = objective(count=None).eval(), batch(np.random.default_rng(0), range(len(SENTENCES)), 4)
    longer = {**full, "signal": torch.cat([full["signal"], torch.zeros_like(full["signal"])], 2)}
    plain, padded = model(full), model(longer)
    torch.testing.assert_close(padded.loss, plain.loss, rtol=0, atol=1e-5)
    for name, value in plain.metrics.items():
        torch.testing.assert_close(padded.metrics[name], value, rtol=0, atol=1e-5)


def test_a_text_of_one_sentence_is_no_fault():
    model, given = objective().eval(), batch(np.random.default_rng(0), range(len(SENTENCES)), 4)
    given["signal"][0, :, 1:] = 0
    loss = model(given).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    alone = {name: value[:1] for name, value in given.items()}
    assert model(alone).loss == 0


def test_backwards_a_passage_begins_with_its_last_sentence():
    model = roused(objective(directions=["backward", "forward"], count=None))
    given = batch(np.random.default_rng(0), range(len(SENTENCES)), 3)
    lengths = [6, 3, 4]
    for signal, length in zip(given["signal"], lengths, strict=True):
        signal[:, length:] = 0
    tokenizer, there = model.encoder.tokenizer, torch.arange(6) < torch.tensor(lengths).unsqueeze(1)
    z = tokenizer.embed(tokenizer.patches(given))
    turned = [torch.cat([row[:length].flip(0), row[length:]]) for row, length in zip(z, lengths, strict=True)]
    back = torch.stack(turned)
    wanted = [
        model.heads[0](back, model.encoder.backbone(back), given["seed"], there).loss,
        model.heads[1](z, model.contexts[0](z), given["seed"], there).loss,
    ]
    loss = model(given).loss
    torch.testing.assert_close(loss, sum(wanted) / 2)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_padding_in_rows_cannot_be_turned():
    with pytest.raises(ValueError, match="'backward' is for signals of one size"):
        turn(torch.zeros(1, 4, 1), (2, 2), "backward", torch.zeros(1, 4, dtype=torch.bool))


def test_from_texts_to_predictions(texts, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("MMSSL_CACHE", str(tmp_path / "cache"))

    def ask(*words):
        code = main([str(word) for word in (*words, "--json")])
        out, err = capfd.readouterr()
        assert code == 0, err
        return json.loads(out)

    run, halves = tmp_path / "run", ["--train", texts / "train", "--test", texts / "test"]
    small = ["signal.sentences=4", "signal.length=24", "model.backbone.dim=16", "train.batch_size=8", "data.workers=0"]
    made = ask("pretrain", "cpc-text-tiny", *small, "train.steps=20", "--data", texts, "--out", run)
    assert made["steps"] == 20
    assert ask("knn", run, *halves)["task"] == "knn"
    assert ask("linear-probe", run, *halves)["task"] == "linear-probe"
    ask("embed", run, texts, "--out", tmp_path / "vectors.parquet")
    tuned = tmp_path / "tuned"
    ask("finetune", run, *halves, "--out", tuned, "train.epochs=1", "train.batch_size=2", "data.workers=0")
    (result,) = ask("predict", tuned, texts / "test" / "digits" / "11.txt")["files"]
    assert {row["label"] for row in result["predictions"]} == {"digits", "letters"}

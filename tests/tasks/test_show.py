"""The panels: what they show against what was computed, the same bytes twice, and a sentence for each mistake."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from PIL import Image
from sklearn.decomposition import PCA

from mmssl.backbones.inspect import attention_maps, heaviest
from mmssl.data.listing import list_files
from mmssl.errors import UnusableData, UserError
from modalities.encoder import MODALITIES, load
from tasks.panels import Files, read_example, read_signal
from tasks.panels_neighbours import neighbours_panel
from tasks.panels_page import draw, write_panel
from tasks.panels_reconstruction import attempts, reconstruction_panel
from tasks.panels_tokens import attention_panel, attention_to_patches, component_colours, pca_panel, principal, split
from tasks.pretrain import pretrain
from tasks.show import PANELS, show
from tasks.writer import load_objective


@pytest.fixture(scope="module")
def run(tmp_path_factory, photos, tiny_settings):
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("show") / "run"
    pretrain("image-mae-tiny", photos / "train", out, {**tiny_settings, "train.steps": 2})
    return out


@pytest.fixture
def files(photos):
    return sorted((photos / "test" / "along").glob("*.png"))[:3]


def signals_of(encoder, files):
    return [read_signal(encoder.config, str(file)) for file in files]


def pictures(block):
    return [[shot.picture for shot in line.shots if shot is not None] for line in block.lines]


# Reconstruction


def reconstructed(run, files, ratios=(0.75, 0.85, 0.95), seed=0):
    recipe, objective = load_objective(run)
    examples = [read_example(recipe, str(file)) for file in files]
    names = [file.name for file in files]
    made = attempts(recipe, objective, run, names, examples, ratios, seed)
    return recipe, objective, reconstruction_panel(recipe, made)


def cut(picture):
    """The 16 patches of 4 x 4 pixels of a picture of 16 x 16."""
    return picture.reshape(4, 4, 4, 4, 3).swapaxes(1, 2).reshape(16, -1)


def test_reconstruction_shows_what_is_seen_and_predicts_the_rest(run, files):
    _, _, panel = reconstructed(run, files, (0.25, 0.5, 0.75))
    for block in panel.blocks:
        (line,) = pictures(block)
        original, seen_before = cut(line[0]), np.ones(16, dtype=bool)
        for i, count in enumerate((12, 8, 4)):
            masked, predicted = cut(line[1 + 2 * i]), cut(line[2 + 2 * i])
            grey = (masked == np.tile(masked[~(masked == original).all(1)][0], (16, 1))).all(1)
            assert (~grey).sum() == count
            np.testing.assert_array_equal(masked[~grey], original[~grey])
            np.testing.assert_array_equal(predicted[~grey], original[~grey])
            assert (predicted[grey] != original[grey]).any(1).all()
            assert not (~grey & ~seen_before).any()  # what is seen at a higher ratio is seen at a lower one
            seen_before = ~grey
    captions = [shot.caption for shot in panel.blocks[0].lines[0].shots]
    assert captions[:3] == ["original", "25 % masked\n12 of 16 seen", "reconstruction"]
    assert panel.note.startswith("MAE saw only what the masked pictures show. ")
    assert "brightness and contrast of each hidden patch are those of the true" in panel.note


def test_masks_follow_from_the_seed_and_the_ratio_reaches_the_objectives_own_mask(run, files):
    _, _, first = reconstructed(run, files, (0.75,))
    _, _, again = reconstructed(run, files, (0.75,))
    _, _, other = reconstructed(run, files, (0.75,), seed=1)
    assert np.array_equal(draw(first), draw(again))
    assert not np.array_equal(draw(first), draw(other))
    masks = [pictures(block)[0][1] for block in reconstructed(run, [files[0]] * 2, (0.75,))[2].blocks]
    assert not np.array_equal(*masks)  # each file has its own


# Attention


@pytest.mark.parametrize("cls_token", [True, False])
def test_attention_shows_the_last_blocks_weights(tiny_encoder, files, cls_token):
    encoder = tiny_encoder(cls_token=cls_token)
    signals = signals_of(encoder, files)
    panel, facts = attention_panel(encoder, [f.name for f in files], signals, 0.6)
    assert facts == {"mass": 0.6}
    assert panel.note.startswith(f"Attention of {'the class token.' if cls_token else 'all tokens on average'}")
    for signal, block in zip(signals, panel.blocks, strict=True):
        tokens = encoder.tokenizer.embed(encoder.tokenizer.cut(signal[None]))
        if cls_token:
            tokens = torch.cat([encoder.cls_token.expand(1, 1, -1), tokens], dim=1)
        maps = attention_maps(encoder.backbone, tokens)[0]
        weights = maps[:, 0, 1:] if cls_token else maps.mean(1)
        heat, kept = pictures(block)
        assert len(heat) == 1 + 4
        assert len(kept) == 4
        for head, mask in enumerate(heaviest(weights, 0.6).numpy(), start=1):
            share = (weights[head - 1] / weights[head - 1].max()).numpy()
            np.testing.assert_array_equal(cut(heat[head])[:, :3], colormaps["inferno"](share, bytes=True)[:, :3])
            lit = (cut(kept[head - 1]) == cut(heat[0])).all(1)
            np.testing.assert_array_equal(lit, mask)
            assert block.lines[1].shots[head].caption == f"{mask.sum()} of 16"  # below its head


def test_attention_is_one_entry_per_file_of_a_page(tiny_encoder, files, tmp_path):
    encoder = tiny_encoder()
    panel, _ = attention_panel(encoder, ["one", "two"], signals_of(encoder, files[:2]), 0.6)
    write_panel(tmp_path / "x.html", panel)
    page = (tmp_path / "x.html").read_text()
    assert page.count("<section") == 2
    assert page.count('alt="input"') == 2
    assert page.count("<img") == 2 * (1 + 4 + 4)
    columns = re.findall(r"<li>(.*)</li>", page)
    assert [re.findall(r'alt="(head \d|input)', column) for column in columns[:5]] == [
        ["input"], *([f"head {i}"] for i in range(1, 5)),
    ]  # fmt: skip
    assert all(len(re.findall(r'alt="\d+ of 16"', column)) == 1 for column in columns[1:5])


def test_weights_that_are_not_finite_are_not_drawn(tiny_encoder, files):
    encoder = tiny_encoder()
    torch.nn.init.constant_(encoder.backbone.blocks[0].mlp.fc2.bias, torch.nan)
    signals = signals_of(encoder, files)
    with pytest.raises(UnusableData, match="x: its features are NaN"):
        attention_panel(encoder, ["x"], signals[:1], 0.6)
    with pytest.raises(UnusableData, match="x: its features are NaN"):
        pca_panel(encoder, ["x"], signals[:1], False)


# Principal components


@pytest.mark.parametrize("foreground", [False, True])
def test_permuting_files_permutes_panels(tiny_encoder, files, foreground):
    encoder = tiny_encoder()
    signals, names = signals_of(encoder, files), [f.name for f in files]
    panel, facts = pca_panel(encoder, names, signals, foreground)
    order = [2, 0, 1]
    permuted, again = pca_panel(encoder, [names[i] for i in order], [signals[i] for i in order], foreground)
    assert again == facts
    for i, block in zip(order, permuted.blocks, strict=True):
        assert block.name == names[i]
        np.testing.assert_array_equal(pictures(block), pictures(panel.blocks[i]))
    alone, _ = pca_panel(encoder, names[:1], signals[:1], foreground)
    assert not np.array_equal(pictures(alone.blocks[0]), pictures(panel.blocks[0]))  # one basis for all


def test_attention_is_measured_against_masks(tmp_path, tiny_encoder, files):
    encoder = tiny_encoder()
    encoder.save(tmp_path / "encoder")
    masks = tmp_path / "masks"
    masks.mkdir()
    for i, file in enumerate(files[:2]):
        width, height = Image.open(file).size
        marked = np.zeros((height, width), np.uint8)
        marked[:, : width // 2 if i == 0 else width] = 1 + i  # any number counts
        Image.fromarray(marked).save(masks / f"{file.stem}.png")
    result = show(tmp_path / "encoder", files[:2], out=tmp_path / "out.png", panel="attention", masks=masks)
    found = list(result.facts["jaccard"].values())
    whole = heaviest(attention_to_patches(encoder, signals_of(encoder, files[1:2])[0])[0], 0.6).float().mean(-1)
    np.testing.assert_allclose(found[1], whole, atol=1e-6)  # all is marked: the share that is lit
    assert result.facts["best"] == pytest.approx(np.mean([max(row) for row in found]))
    assert 0 < min(found[0]) < max(found[0]) < 1
    assert f"{result.facts['best']:.3f} on average" in result.note
    (masks / f"{files[1].stem}.png").rename(masks / "another.png")
    with pytest.raises(UserError, match=f"holds no {files[1].stem}.png for"):
        show(tmp_path / "encoder", files[:2], out=tmp_path / "out.png", panel="attention", masks=masks)
    with pytest.raises(UserError, match="is one mask, but 2 files are shown"):
        show(tmp_path / "encoder", files[:2], out=tmp_path / "o.png", panel="attention", masks=masks / "another.png")
    with pytest.raises(UserError, match="--masks is for the panel attention, not for pca"):
        show(tmp_path / "encoder", files[:2], out=tmp_path / "out.png", panel="pca", masks=masks)


def test_signals_of_different_sizes_share_a_page(tiny_encoder, run):
    encoder, names = tiny_encoder(), ["square", "wide"]
    recipe, objective = load_objective(run)
    signals = [torch.randn(3, 16, 16), torch.randn(3, 8, 24)]
    examples = [{"signal": signal} for signal in signals]
    panels = [
        attention_panel(encoder, names, signals, 0.6)[0],
        pca_panel(encoder, names, signals, True)[0],
        reconstruction_panel(recipe, attempts(recipe, objective, run, names, examples, (0.5,), 0)),
    ]
    for panel in panels:
        shapes = [{picture.shape for line in pictures(block) for picture in line} for block in panel.blocks]
        assert shapes == [{(16, 16, 3)}, {(8, 24, 3)}]
        assert draw(panel).ndim == 3


def test_components_equal_scikit_learns_and_have_their_sign(tiny_encoder):
    tokens = np.random.default_rng(0).normal(size=(50, 8)) * np.arange(1, 9)
    values, shares = principal(tokens)
    theirs = PCA(3).fit(tokens)
    np.testing.assert_allclose(np.abs(values), np.abs(theirs.transform(tokens)), atol=1e-9)
    np.testing.assert_allclose(shares, theirs.explained_variance_ratio_)
    weights = np.linalg.lstsq(values, tokens - tokens.mean(0), rcond=None)[0]
    assert (weights[range(3), np.abs(weights).argmax(1)] > 0).all()
    np.testing.assert_allclose(principal(-tokens)[0], -values, atol=1e-9)


def test_components_beyond_the_rank_are_grey():
    line = np.outer(np.arange(10.0), np.ones(6))
    values, shares = principal(line)
    assert not values[:, 1:].any()
    np.testing.assert_allclose(shares, [1, 0, 0], atol=1e-12)
    colours, _ = component_colours(line, np.ones(10, dtype=bool))
    assert (colours[:, 1:] == 128).all()
    assert colours[:, 0].min() == 0
    assert colours[:, 0].max() == 255
    assert principal(np.ones((4, 2)))[0].shape == (4, 3)


def test_background_is_black_and_has_no_part_in_the_colours(tiny_encoder, monkeypatch):
    encoder = tiny_encoder()
    rng = np.random.default_rng(0)
    inside = np.zeros((4, 4), dtype=bool)
    inside[1:3, 1:3] = True
    # The thing lies inside; the background's tokens are far away from it.
    tokens = torch.from_numpy(rng.normal(size=(16, 8)) - 40 * ~inside.ravel()[:, None])
    for sign in (1, -1):  # whichever side is positive
        monkeypatch.setattr(encoder, "tokens", lambda _, sign=sign: (sign * tokens[None].float(), (4, 4)))
        panel, facts = pca_panel(encoder, ["x"], [torch.zeros(3, 16, 16)], True)
        colours = cut(pictures(panel.blocks[0])[0][1])
        np.testing.assert_array_equal(colours.any(1), inside.ravel())
        assert facts["foreground"] == 0.25
        assert facts["explained"][0] < 0.9


def test_pictures_that_are_all_background_are_pointed_out(tiny_encoder, monkeypatch):
    encoder = tiny_encoder()
    rng = np.random.default_rng(0)
    # The first component tells the first two signals from the third.
    tokens = [torch.from_numpy(rng.normal(size=(1, 16, 8)) + 40 * (i == 2)).float() for i in range(3)]
    monkeypatch.setattr(encoder, "tokens", lambda signals: (tokens[int(signals[0].max())], (4, 4)))
    signals = [torch.full((3, 16, 16), float(i)) for i in range(3)]
    panel, _ = pca_panel(encoder, ["a", "b", "c"], signals, True)
    captions = [block.lines[0].shots[1].caption for block in panel.blocks]
    assert len(set(captions[:2])) == 1
    assert {caption.split("\n")[1] for caption in captions} == {"all foreground", "all background"}
    assert "Of 3 files, " in panel.note
    assert "the first component divides the files rather than what is in them" in panel.note
    assert panel.note.endswith("try more or other files.")
    assert "Of 3 files" not in pca_panel(encoder, ["a", "b", "c"], signals, False)[0].note
    tokens[0][0, :5], tokens[1][0, :5], tokens[2][0, :5] = tokens[2][0, :5], tokens[2][0, :5], -tokens[2][0, :5]
    assert "try more" not in pca_panel(encoder, ["a", "b", "c"], signals, True)[0].note


def test_the_split_lies_between_two_groups():
    values = np.array([1.0, 1.2, 0.9, 5.0, 5.1, 1.1])
    assert split(values) == 1.2
    assert split(np.array([3.0, 3.0])) == 3.0
    assert split(-values) == -5.0


# Neighbours


def nearest_of(run, files, folder, k, skip_broken=False):
    encoder = load(run)
    named = Files([str(f) for f in files], [f.name for f in files])
    listing = list_files(folder, MODALITIES["image"])
    return neighbours_panel(encoder, named, signals_of(encoder, files), listing, k, skip_broken)


def test_neighbours_are_the_nearest_others(run, photos, files):
    panel, facts = nearest_of(run, files, photos / "test", 4)
    encoder, paths = load(run), list_files(photos / "test", MODALITIES["image"]).paths
    every, asked = (F.normalize(encoder.embed(list(group)), dim=1) for group in (paths, files))
    for file, row, found, block in zip(files, asked @ every.T, facts["neighbours"], panel.blocks, strict=True):
        row[paths.index(str(file))] = -2
        assert [str(photos / "test" / n["path"]) for n in found] == [paths[i] for i in row.topk(4).indices]
        np.testing.assert_allclose([n["similarity"] for n in found], row.topk(4).values, atol=1e-5)
        shots = block.lines[0].shots
        assert shots[0].caption == "query\nalong"
        assert [shot.caption.split("\n") for shot in shots[1:]] == [
            [f"{n['similarity']:.4f}", n["path"].split("/")[0], n["path"]] for n in found
        ]
        assert [n["label"] for n in found] == [n["path"].split("/")[0] for n in found]
        nearest = encoder.kind.picture(read_signal(encoder.config, paths[int(row.argmax())]), encoder.config.signal)
        assert np.array_equal(shots[1].picture, nearest)


def test_a_file_is_not_its_own_neighbour_by_any_spelling_but_a_copy_is(run, files, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for i, file in enumerate(files):
        shutil.copy(file, folder / f"{i}.png")
    shutil.copy(files[0], folder / "copy.png")
    (folder / "link.png").symlink_to("0.png")
    (tmp_path / "other").symlink_to(folder)
    panel, facts = nearest_of(run, [tmp_path / "other" / "0.png", folder / "1.png"], folder, 3)
    first, second = ([n["path"] for n in found] for found in facts["neighbours"])
    assert first[0] == "copy.png"
    assert set(first) == {"copy.png", "1.png", "2.png"}
    assert "1.png" not in second
    assert len(second) == 3
    assert "whatever their split, but for the query itself" in panel.note
    assert [n["label"] for n in facts["neighbours"][0]] == [None] * 3
    assert panel.blocks[0].lines[0].shots[1].caption.endswith("\ncopy.png")
    assert panel.blocks[0].lines[0].shots[1].caption.count("\n") == 1
    assert "no more than" not in panel.note
    assert "no more than 3 others" in nearest_of(run, [folder / "0.png"], folder, 8)[0].note
    (folder / "broken.png").write_bytes(b"words")
    with pytest.raises(UnusableData, match=r"broken\.png"):
        nearest_of(run, files[:1], folder, 2)
    panel, facts = nearest_of(run, files[:1], folder, 2, skip_broken=True)
    assert facts["skipped"][0]["path"] == "broken.png"
    assert "1 broken file is left out" in panel.note


# The command


@pytest.mark.parametrize("suffix", [".png", ".html"])
@pytest.mark.parametrize("panel", PANELS)
def test_two_calls_write_the_same_bytes(run, vectors, photos, files, tmp_path, panel, suffix):
    source, given = (vectors, []) if panel == "tsne" else (run, files)
    options = {"data": photos / "test"} if panel == "neighbours" else {}
    outs = [tmp_path / name / f"out{suffix}" for name in ("a", "b")]
    for out in outs:
        result = show(source, given, out=out, panel=panel, **options)
        assert json.loads(json.dumps(result.as_dict()))["files"] == [str(file) for file in given]
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert [path.name for path in outs[0].parent.iterdir()] == [f"out{suffix}"]
    if suffix == ".png":
        with Image.open(outs[0]) as image:
            assert image.mode == "RGB"
            assert min(image.size) > 100
    else:
        text = outs[0].read_text()
        assert text.count("<img") >= max(1, 2 * len(given))
        assert all(file.name in text for file in given)


def test_the_source_decides_what_is_shown(ask, run, vectors, files, tmp_path):
    for source, given, panel in ((run, files, "reconstruction"), (run / "encoder", files, "attention"),
                                 (vectors, (), "tsne")):  # fmt: skip
        code, out, _ = ask("show", source, *given, "--out", tmp_path / "x.png", "--json")
        assert code == 0
        result = json.loads(out)
        assert result["panel"] == panel
        assert result["out"] == str(tmp_path / "x.png")
    code, out, _ = ask("show", run, files[0].parent, "--panel", "pca", "--foreground", "--out", tmp_path / "x.html")
    assert code == 0
    assert "x.html: pca of 4 files" in out
    code, out, _ = ask("show", run, files[0], "--ratios", "0.5", "--seed", "7", "--out", tmp_path / "y.png", "--json")
    assert json.loads(out)["ratios"] == [0.5]


def test_a_broken_file_exits_3_and_leaves_nothing(ask, run, files, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(files[0].read_bytes()[:60])
    for panel in ("reconstruction", "attention", "pca"):
        code, _, err = ask("show", run, files[0], bad, "--panel", panel, "--out", tmp_path / "x.png")
        assert code == 3
        assert f"{bad}: truncated" in err
    assert not (tmp_path / "x.png").exists()


def test_an_objective_that_reconstructs_nothing_shows_its_attention(run, files, tmp_path, monkeypatch):
    recipe, _ = load_objective(run)
    monkeypatch.setattr("tasks.show.load_objective", lambda _: (recipe, torch.nn.Identity()))
    assert show(run, files, out=tmp_path / "x.png").panel == "attention"
    with pytest.raises(UserError, match="mae reconstructs nothing; give --panel attention or pca"):
        show(run, files, out=tmp_path / "x.png", panel="reconstruction")


def test_damaged_weights_are_a_sentence(ask, run, files, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    weights = copy / "objective" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    code, _, err = ask("show", copy, files[0], "--out", tmp_path / "x.png")
    assert code == 2
    assert "copy/objective/model.safetensors: not the weights of" in err
    assert ask("show", copy, files[0], "--panel", "attention", "--out", tmp_path / "x.png")[0] == 0


# fmt: off
# ruff: noqa: E501
MISTAKES = {
    "{run} {file} --out {new}.jpg": "must end in .png or .html",
    "{run} {file}": "Missing option '--out'",
    "{run} --out {new}.png": "name at least one file to show, of modality image (.bmp, ",
    "{run}x {file} --out {new}.png": "does not exist; did you mean 'run'?",
    "{run} {file}g --out {new}.png": "does not exist; did you mean",
    "{run} {run}/config.yaml --out {new}.png": "neither a folder, a manifest",
    "{run} {file} --out {new}.png --panel atention": "'atention' is not a panel; did you mean 'attention'?",
    "{run}/encoder {file} --out {new}.png --panel reconstruction": "give the run {run}",
    "{photos} {file} --out {new}.png": "neither an encoder folder nor a run",
    "{photos} {file} --out {new}.png --panel reconstruction": "neither an encoder folder nor a run",
    "{run} {file} --out {new}.png --panel tsne": "write one first with mmssl embed",
    "{vectors} {file} --out {new}.png": "no further file is shown",
    "{vectors} --out {new}.png --panel attention": "give the encoder for attention",
    "{vectors} --out {new}.png --color-by labl": "did you mean 'label'?",
    "{vectors} --out {new}.png --most 3": "--most must be at least 4",
    "{run} {file} --out {new}.png --ratios 0.5,1": "--ratios are shares between 0 and 1",
    "{run} {file} --out {new}.png --ratios half": "--ratios half: give numbers",
    "{run} {file} --out {new}.png --ratios nan": "--ratios are shares between 0 and 1",
    "{run} {file} --out {new}.png --panel attention --mass 1.5": "--mass is a share between 0 and 1",
    "{run} {file} --out {new}.png --panel attention --ratios 0.5": "--ratios is for the panel reconstruction, not for attention",
    "{run} {file} --out {new}.png --mass 0.5": "--mass is for the panel attention, not for reconstruction",
    "{run} {file} --out {new}.png --panel neighbours": "give --data",
    "{run} {file} --out {new}.png --panel neighbours --data {photos}x": "does not exist",
    "{run} {file} --out {new}.png --panel neighbours --data {file}": "no other file",
    "{run} {file} --out {new}.png --panel neighbours --data {photos} -k 0": "--k must be at least 1",
    "{run} {file} --out {new}.png --seed -1": "--seed must be from 0",
    "{run} {photos} --out {new}.png": "shows at most 16 files, but 30 were given; give fewer, or an .html page",
    "{run} {file} --out {folder}": "is a folder",
    "{run} {file} --out {file}": "is one of the files to show",
}
# fmt: on


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_gets_one_sentence_and_exit_2(ask, run, vectors, photos, files, tmp_path, line):
    (tmp_path / "folder.png").mkdir()
    before = files[0].read_bytes()
    places = {"run": run, "vectors": vectors, "photos": photos, "file": files[0], "new": tmp_path / "new",
              "folder": tmp_path / "folder.png"}  # fmt: skip
    code, out, err = ask("show", *line.format(**places).split())
    assert code == 2, err
    assert MISTAKES[line].format(**places) in err
    assert err.count("\n") == 1
    assert out == ""
    assert not list(tmp_path.glob("new*"))
    assert files[0].read_bytes() == before

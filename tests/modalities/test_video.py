"""Videos whose frames say which one they are: read, cropped, normalised, cut into tubes and trained on."""

import pickle
import time
from contextlib import contextmanager

import numpy as np
import PIL.Image
import pytest
import torch
from media import cut, numbered, numbers, write_animation, write_frames, write_video

from mmssl.config import validate
from mmssl.data import isolate
from mmssl.data.guard import BrokenFile, guarded
from mmssl.errors import UnusableData, UserError
from mmssl.objectives.mae import MAEConfig
from modalities import video, video_views
from modalities.augment import Augment, Erase, RandAugment
from modalities.encoder import Encoder, EncoderConfig, typed
from modalities.image_views import crop_box
from modalities.video import VideoSignal, VideoTokenizer, corners, covering, still

VIDEO = video.Video()
H, W = 48, 64
WHOLE = {"size": (H, W), "crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "flip": False}
"""A crop that is the whole frame, so that numbers can be read."""
RAW = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def settings(**changes):
    return VideoSignal(**{"frames": 4, "stride": 2, **WHOLE, **changes})


def clips(path, signal, *seeds):
    views = VIDEO.views(signal)(str(path), [np.random.default_rng(s) for s in seeds], (signal.frames, *signal.size))
    for view in views:
        x = view["signal"]
        assert x.dtype == torch.float32
        assert x.shape == (3, signal.frames, *signal.size)
        assert x.is_contiguous()
    return [view["signal"] for view in views]


def evaluated(path, signal):
    return VIDEO.eval_transform(signal)(VIDEO.decode(str(path)))


def read(x, signal):
    """Return the numbers of a signal's frames."""
    return numbers(VIDEO.motion(x, signal))


def reason(call, *arguments):
    with pytest.raises(BrokenFile) as caught:
        call(*arguments)
    return caught.value.reason


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """40 frames as PNG: exact."""
    return write_frames(tmp_path_factory.mktemp("frames"), numbered(40, H, W))


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("film") / "x.mp4", numbered(40, H, W), crf="10", g="12", bf="2")


@pytest.fixture
def here(monkeypatch):
    """Reads in this process, where a test can look on."""
    for module in (video, video_views):
        monkeypatch.setattr(module, "isolated", guarded)


# Training clips


def test_a_clip_has_every_so_many_th_frame_from_a_random_start(film):
    signal = settings(stride=3)
    starts = set()
    for seed in range(12):
        first, *rest = read(clips(film, signal, seed)[0], signal)
        assert rest == [first + 3, first + 6, first + 9]
        starts.add(first)
    assert len(starts) > 5


def test_the_generator_alone_decides(film):
    signal = VideoSignal(frames=4, stride=2, size=32)
    views, size = VIDEO.views(signal), (4, 32, 32)
    first = views(str(film), [np.random.default_rng(5)], size)[0]["signal"]
    isolate.close()  # another process, with other global generators
    np.random.seed(1)
    torch.manual_seed(1)
    again = pickle.loads(pickle.dumps(views))(str(film), [np.random.default_rng(5)], size)[0]["signal"]
    assert torch.equal(first, again)
    assert not torch.equal(first, clips(film, signal, 6)[0])


def test_several_clips_open_the_file_once_and_do_not_know_of_each_other(film, here, monkeypatch):
    signal = VideoSignal(frames=4, stride=2, size=(20, 28))
    alone = [clips(film, signal, seed)[0] for seed in range(5)]
    opened, count = video_views.open_video, []
    monkeypatch.setattr(video_views, "open_video", lambda *given: count.append(given[0]) or opened(*given))
    together = clips(film, signal, *range(5))
    assert count == [str(film)]
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert len({x.sum().item() for x in together}) == 5


def test_a_clip_is_one_box_of_its_frames_resized_and_perhaps_mirrored(folder):
    signal, mirrored = VideoSignal(frames=4, stride=2, size=(20, 28), **RAW), 0
    for seed in range(8):
        x = clips(folder, signal, seed)[0]
        rng = np.random.default_rng(seed)
        inner = np.random.default_rng(int(rng.integers(2**63)))
        start = int(inner.random() * 34)
        box = crop_box(H, W, still(signal), inner, 28 / 20)
        frames = [PIL.Image.fromarray(f).crop(box) for f in numbered(40, H, W)[start : start + 7 : 2]]
        slow = np.stack([np.asarray(f.resize((28, 20), PIL.Image.Resampling.BICUBIC)) for f in frames])
        flip = rng.random() < 0.5
        mirrored += flip
        slow = slow[:, :, ::-1] if flip else slow
        steps = np.abs(VIDEO.motion(x, signal).astype(int) - slow)
        # Rows first or columns first, 16 bits or 22 for a weight: they round differently at times.
        assert steps.max() <= 3
        assert steps.mean() < 0.1
    assert 0 < mirrored < 8


def test_sources_of_24_and_60_frames_per_second_give_the_same_clip(tmp_path):
    def scene(rate):
        t = np.arange(2 * rate)[:, None, None, None] / rate
        rows, columns = np.mgrid[:24, :32, :3][:2]
        return (128 + 100 * np.sin(rows / 7 + columns / 9 + 3 * t)).astype(np.uint8)

    files = {rate: write_frames(tmp_path / str(rate), scene(rate)) for rate in (24, 60)}

    def distance(**how):
        for seed in range(4):
            a, b = (
                clips(file, settings(frames=6, size=(24, 32), folder_fps=rate, **RAW, **how), seed)[0]
                for rate, file in files.items()
            )
            yield (a - b).abs().mean().item()

    # They may start 1 / 24 s apart, which moves the scene by an eighth of a radian.
    assert max(distance(fps=6)) < 0.06
    assert min(distance(stride=4)) > 0.1


def test_uniform_and_tsn_clips_cover_the_file(film):
    signal = settings(sampling="uniform")
    assert read(clips(film, signal, 0)[0], signal) == [5, 15, 25, 35]
    signal = settings(sampling="tsn")
    found = np.array([read(x, signal) for x in clips(film, signal, *range(6))])
    assert (found // 10 == np.arange(4)).all()
    assert len(np.unique(found)) > 10


def test_a_video_shorter_than_a_clip_is_skipped_or_held(tmp_path):
    path = write_frames(tmp_path / "short", numbered(5, H, W))
    signal = settings(stride=3)
    assert reason(clips, path, signal, 0).startswith("too short: 5 of the 10 frames")
    held = settings(stride=3, short="hold")
    assert read(clips(path, held, 0)[0], held) == [0, 3, 4, 4]
    # Evaluation leaves nothing out.
    assert read(evaluated(path, signal), signal) == [0, 3, 4, 4]


def test_augmentation_is_the_same_for_all_frames(tmp_path):
    still_life = np.repeat(numbered(1, H, W), 4, axis=0)
    path = write_frames(tmp_path / "still", still_life)
    plain = settings(size=(24, 32), stride=1)
    augment = Augment(randaugment=RandAugment(ops=3), grey=0.5, erase=Erase(mode="zero"))
    signal, different = settings(size=(24, 32), stride=1, augment=augment), 0
    for seed in range(6):
        (x,), (without,) = clips(path, signal, seed), clips(path, plain, seed)
        assert torch.equal(x, x[:, :1].expand_as(x))
        different += not torch.equal(x, without)
    assert different >= 4


def test_large_frames_are_decoded_smaller_unless_that_is_switched_off(tmp_path, here, monkeypatch):
    large = numbered(6, H, W).repeat(4, 1).repeat(4, 2)
    path, sizes, opened = write_video(tmp_path / "x.mp4", large, crf="10"), [], video_views.open_video

    @contextmanager
    def watched(*given):
        with opened(*given) as reader:
            whole = reader.read
            reader.read = lambda indices, size=None: sizes.append(size) or whole(indices, size)
            yield reader

    monkeypatch.setattr(video_views, "open_video", watched)
    how = {"size": (24, 32), "stride": 1, "crop_scale": (0.5, 0.5), **RAW}
    for seed in range(4):
        fast, slow = (clips(path, settings(draft=draft, **how), seed)[0] for draft in (True, False))
        assert (48, 64) in sizes
        assert sizes[-1] is None
        # A box begins with a pixel, which is larger in one of them.
        assert 0 < (fast - slow).abs().mean() < 0.02


# What a video may be


def test_a_fragment_is_a_video_of_its_own(film, folder):
    signal = settings(stride=1, short="hold")
    for path in (film, folder):  # both have 25 frames per second
        for seed in range(5):
            found = read(clips(f"{path}#t=0.4,0.8", signal, seed)[0], signal)
            assert min(found) >= 10
            assert max(found) < 20
        assert read(evaluated(f"{path}#t=0.4,0.8", signal), signal) == [13, 14, 15, 16]
        assert VIDEO.inspect(f"{path}#t=0.4,0.8") == (10, H, W)
    slower = settings(stride=1, folder_fps=10)
    assert read(evaluated(f"{folder}#t=1,2", slower), slower) == [13, 14, 15, 16]
    assert "no frame" in reason(evaluated, f"{film}#t=7,8", signal)


def test_a_folder_of_frames_is_the_video_exactly_and_a_coded_one_nearly(folder, film):
    signal = settings(**RAW)
    exact, coded = clips(folder, signal, 3)[0], clips(film, signal, 3)[0]
    start = read(exact, signal)[0]
    assert np.array_equal(VIDEO.motion(exact, signal), numbered(40, H, W)[start : start + 7 : 2])
    assert read(coded, signal) == read(exact, signal)
    assert (coded - exact).abs().mean() < 0.05


@pytest.mark.parametrize("name", ["x.gif", "x.mkv", "x.webm"])
def test_other_containers_are_read_alike(tmp_path, name):
    write = write_animation if name.endswith("gif") else write_video
    path, signal = write(tmp_path / name, numbered(12, H, W)), settings(stride=3, sampling="uniform")
    assert read(clips(path, signal, 0)[0], signal) == [1, 4, 7, 10]
    assert VIDEO.inspect(str(path)) == (12, H, W)


def test_all_frames_are_decoded_to_tell_whether_a_file_is_whole(film, tmp_path):
    assert VIDEO.inspect(str(film)) == (40, H, W)
    assert reason(VIDEO.inspect, str(cut(film, 0.5, tmp_path / "half.mp4")))
    frames = write_frames(tmp_path / "frames", numbered(9, H, W))
    cut(frames / "frame7.png", 0.5)
    assert "frame7.png" in reason(VIDEO.inspect, str(frames))
    (tmp_path / "text.mp4").write_text("no video")
    assert reason(VIDEO.inspect, str(tmp_path / "text.mp4"))


def test_a_decoder_that_hangs_is_ended_by_whoever_sets_the_limit(film, monkeypatch):
    isolate.close()  # the next child is forked from this process as it is then
    with monkeypatch.context() as patched:
        patched.setattr(video_views, "open_video", lambda *given: time.sleep(60))
        began = time.monotonic()
        found = reason(guarded, lambda path: clips(path, settings(), 0), str(film), 0.2)
        assert found == "timed out after 0.2 s"
        assert time.monotonic() - began < 30
    assert len(clips(film, settings(), 0)) == 1


# Evaluation


def test_evaluation_takes_the_middle_and_normalises(folder):
    signal = settings()
    x = evaluated(folder, signal)
    assert read(x, signal) == [16, 18, 20, 22]
    expected = torch.from_numpy(numbered(40, H, W)[16:23:2]).permute(3, 0, 1, 2) / 255
    mean, std = (torch.tensor(getattr(signal, name)).view(3, 1, 1, 1) for name in ("mean", "std"))
    torch.testing.assert_close(x, (expected - mean) / std, rtol=0, atol=2e-6)


def test_several_views_are_clips_over_time_times_crops_along_the_longer_side(folder):
    signal = settings(size=(H, 32), views=(5, 3), **RAW)
    x = evaluated(folder, signal)
    assert x.shape == (15, 3, 4, H, 32)
    whole = evaluated(folder, settings(views=(5, 1), **RAW))
    assert [read(clip, signal)[0] for clip in whole] == [0, 8, 16, 24, 33]
    for view, made in enumerate(x):
        left = view % 3 * 16
        assert torch.equal(made, whole[view // 3][..., left : left + 32])
    tall = settings(size=(16, W), views=(1, 2), **RAW)
    top, bottom = evaluated(folder, tall)
    one = evaluated(folder, settings(**RAW))
    assert torch.equal(top, one[:, :, :16])
    assert torch.equal(bottom, one[:, :, -16:])
    sparse = settings(sampling="uniform", views=(2, 1))
    assert [read(clip, sparse) for clip in evaluated(folder, sparse)] == [[2, 12, 22, 32], [7, 17, 27, 37]]


def test_crops_lie_in_the_resized_frame():
    assert covering((144, 256), (224, 224), 1.0) == (224, 398)
    assert covering((144, 256), (224, 224), 0.875) == (256, 455)
    assert covering((256, 144), (32, 64), 1.0) == (114, 64)
    assert corners((224, 398), (224, 224), 1) == [(0, 87)]
    assert corners((224, 398), (224, 224), 3) == [(0, 0), (0, 87), (0, 174)]
    assert corners((256, 230), (224, 224), 2) == [(0, 3), (32, 3)]


def tiny(decode_ratio=1.0, frames=8, size=(16, 24), views=(1, 1)):
    config = typed(EncoderConfig, "video", "test")(
        modality="video",
        signal={"frames": frames, "size": size, "stride": 1, "views": views},
        model={
            "tokenizer": {"patch_size": (2, 8, 8)},
            "backbone": {"dim": 24, "depth": 2, "num_heads": 2},
            "cls_token": False,
        },
    )
    decoder = {"dim": 12, "depth": 1, "num_heads": 2}
    settings = MAEConfig(mask="tube", mask_ratio=0.6, decode_ratio=decode_ratio, decoder=decoder)
    return settings.build({"video": Encoder(config)})


def test_an_encoder_averages_views_and_names_broken_files(film, tmp_path):
    encoder = tiny(views=(2, 3)).encoder
    views = encoder.read(str(film))
    assert views.shape == (6, 3, 8, 16, 24)
    (vector,) = encoder.embed([str(film)])
    torch.testing.assert_close(vector, encoder.embed(views).mean(0))
    broken = cut(film, 0.4, tmp_path / "broken.mp4")
    with pytest.raises(UnusableData, match=r"broken\.mp4"):
        encoder.embed([str(film), str(broken)])


# Tokens


@pytest.mark.parametrize("size", [(4, 16, 16), (6, 8, 24), (2, 40, 8)])
def test_tubes_of_any_grid_come_back(size):
    signal = VideoSignal(frames=size[0], size=size[1:])
    tokenizer = VIDEO.tokenizer(signal, VideoTokenizer(patch_size=(2, 8, 8)), 24)
    x = torch.randn(2, 3, *size)
    patches = tokenizer.cut(x)
    assert patches.shape == (2, size[0] * size[1] * size[2] // 128, 384)
    assert torch.equal(tokenizer.unpatch(patches), x)
    torch.testing.assert_close(tokenizer.untarget(tokenizer.target(patches), patches), patches, rtol=0, atol=2e-6)
    first, *_ = tokenizer.grid_of(x.shape[2:])
    tube = patches[1, -1].view(2, 8, 8, 3)
    assert torch.equal(tube, x[1, :, -2:, -8:, -8:].permute(1, 2, 3, 0))
    assert first == size[0] // 2


def test_time_goes_on_where_space_is_interpolated():
    tokenizer = VIDEO.tokenizer(VideoSignal(frames=4, size=16), VideoTokenizer(patch_size=(2, 8, 8)), 24)
    own = tokenizer.positions().view(2, 2, 2, 24)
    longer = tokenizer.positions((5, 2, 2)).view(5, 2, 2, 24)
    assert torch.equal(longer[:2], own)
    assert tokenizer.positions((2, 4, 4)).shape == (32, 24)


def test_what_is_masked_is_masked_in_all_frames_and_unseen(draw_batch):
    mae = tiny()
    x = torch.randn(2, 3, 8, 16, 24)
    batch = draw_batch(mae, x)
    hidden = torch.zeros(2, 24, dtype=torch.bool).scatter(1, batch["drop"], True).view(2, 4, 2, 3)
    assert torch.equal(hidden, hidden[:, :1].expand_as(hidden))
    places = hidden[:, 0].repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None, None].expand_as(x)
    other = torch.where(places, torch.randn_like(x), x)

    def latent(signal):
        return mae.encoder(mae.encoder.tokenizer.cut(signal), batch["keep"])

    assert torch.equal(latent(other), latent(x))
    assert not torch.equal(latent(torch.where(places, x, torch.randn_like(x))), latent(x))
    assert mae(batch).loss != mae(batch | {"signal": other}).loss


@pytest.mark.parametrize(("decode_ratio", "predicted"), [(1.0, 16), (0.5, 8)])
def test_mae_learns_a_step_with_all_or_half_of_the_hidden_tubes(draw_batch, decode_ratio, predicted):
    mae, seen = tiny(decode_ratio), []
    mae.decoder.head.register_forward_hook(lambda module, given, out: seen.append(out.shape[1]))
    batch = draw_batch(mae, torch.randn(2, 3, 8, 16, 24))
    optimizer = torch.optim.SGD(mae.parameters(), lr=0.05)
    losses = []
    for _ in range(3):
        loss = mae(batch).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in mae.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    assert set(seen) == {predicted}


# Pictures and settings


def test_pictures_are_film_strips_on_which_tokens_lie_where_they_were(folder):
    signal = settings(size=(16, 24))
    x = evaluated(folder, signal)
    strip = VIDEO.picture(x, signal)
    assert strip.shape == (16, 4 * 24, 3)
    assert np.array_equal(VIDEO.motion(x, signal), np.stack(np.split(strip, 4, axis=1)))
    values = np.arange(12 * 2).reshape(12, 2)
    lattice = VIDEO.lattice(values, (2, 2, 3))
    assert lattice.shape == (2, 6, 2)
    assert lattice[1, 5].tolist() == values[11].tolist()
    assert lattice[1, 2].tolist() == values[5].tolist()
    assert lattice[0, 3].tolist() == values[6].tolist()


def test_moments_are_those_of_frames_spread_over_the_file(folder):
    count, total, squares = VIDEO.moments(str(folder), settings()).T
    frames = numbered(40, H, W)[[2, 7, 12, 17, 22, 27, 32, 37]].reshape(-1, 3) / 255
    assert count.tolist() == [8 * H * W] * 3
    np.testing.assert_allclose(total / count, frames.mean(0))
    np.testing.assert_allclose(squares / count, np.square(frames).mean(0))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"frames": 0}, "frames: input should be greater than 0"),
        ({"crop_scale": [0.9, 0.5]}, r"crop_scale: is \[least, greatest\]"),
        ({"crop_scale": [0.5, 1.5]}, "crop_scale.*less than or equal to 1"),
        ({"sampling": "densly"}, "did you mean 'dense'"),
        ({"views": [5, 0]}, "views.*greater than 0"),
        ({"stirde": 4}, "did you mean 'stride'"),
        ({"std": [0.2, 0.0, 0.2]}, "std.*greater than 0"),
    ],
)
def test_bad_settings_are_told_in_a_sentence(given, sentence):
    with pytest.raises(UserError, match=sentence):
        validate(VideoSignal, given, "recipe")


def test_tubes_must_divide_the_clip():
    with pytest.raises(ValueError, match="not a multiple of patch size"):
        VIDEO.tokenizer(VideoSignal(frames=15), VideoTokenizer(), 24)
    assert VIDEO.sizes(VideoSignal(size=112), None) == ((16, 112, 112),)

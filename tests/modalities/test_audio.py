"""Sounds: every format and every fault, pieces of files, training pieces, evaluation signals, pictures."""

import math
import pickle

import numpy as np
import pytest
import soundfile
import torch
from media import cut, tone, write_sound
from torchaudio.functional import resample

from mmssl.config import validate
from mmssl.data.guard import BrokenFile
from mmssl.errors import UserError
from modalities import audio_read
from modalities.audio import GREY, Audio
from modalities.audio_read import Sound, opened, piece, resampled_length
from modalities.audio_settings import AudioSignal, AudioTokenizer, SpecMask, filterbank

AUDIO = Audio()
# An eighth of the usual size: 16 frames of 10 ms make a patch.
SMALL = {"sample_rate": 8000, "seconds": 0.32, "mels": 32}
PATCH = AudioTokenizer()


def noise(seconds, rate, channels=1, seed=0):
    samples = np.random.default_rng(seed).normal(0, 0.1, (round(seconds * rate), channels))
    return samples.astype(np.float32)


def ramp(count):
    """Samples that say where they are, exact as floats."""
    return np.arange(count, dtype=np.float32) / 2**20


def places(x):
    """Return where samples of a ramp are from."""
    return (x * 2**20).round().long()


def reason(path, read=AUDIO.decode):
    with pytest.raises(BrokenFile) as caught:
        read(str(path))
    return caught.value.reason


@pytest.mark.parametrize(
    ("name", "subtype", "tolerance"),
    [
        ("wav", "PCM_U8", 1e-2),
        ("wav", "PCM_16", 1e-4),
        ("wav", "PCM_24", 1e-6),
        ("wav", "PCM_32", 1e-7),
        ("wav", "FLOAT", 0),
        ("wav", "DOUBLE", 0),
        ("wav", "ULAW", 5e-2),
        ("flac", "PCM_S8", 1e-2),
        ("flac", "PCM_24", 1e-6),
        ("aiff", "PCM_16", 1e-4),
        ("au", "PCM_16", 1e-4),
        ("caf", "PCM_16", 1e-4),
        ("w64", "PCM_16", 1e-4),
        ("ogg", "VORBIS", 5e-2),
        ("opus", "OPUS", 5e-2),
        ("mp3", "MPEG_LAYER_III", 5e-2),
    ],
)
@pytest.mark.parametrize("channels", [1, 2])
def test_every_format(tmp_path, name, subtype, tolerance, channels):
    path = tmp_path / f"x.{name}"
    assert path.suffix in AUDIO.suffixes
    samples = tone(0.5, 24000, channels=channels)
    soundfile.write(path, samples, 24000, subtype=subtype, format="OGG" if name == "opus" else None)
    sound = AUDIO.decode(str(path))
    assert sound.rate == 24000
    assert sound.waveform.shape == (12000,)
    assert sound.waveform.dtype == torch.float32
    assert np.square(sound.waveform.numpy() - samples.mean(1)).mean() ** 0.5 <= tolerance
    assert AUDIO.inspect(str(path)) == (0.5, 24000, channels)


def test_many_channels_are_averaged(tmp_path):
    samples = noise(0.1, 8000, 7)
    path = write_sound(tmp_path / "x.wav", samples, 8000, "FLOAT")
    torch.testing.assert_close(AUDIO.decode(str(path)).waveform, torch.from_numpy(samples.mean(1)))


@pytest.mark.parametrize("name", ["wav", "flac", "ogg", "opus", "mp3", "aiff", "au", "w64", "caf"])
@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.97])
def test_truncated_files_are_never_shorter_sounds(tmp_path, name, fraction):
    path = tmp_path / f"x.{name}"
    soundfile.write(path, noise(2, 16000), 16000, format="OGG" if name in ("ogg", "opus") else None,
                    subtype="OPUS" if name == "opus" else None)  # fmt: skip
    AUDIO.decode(str(path))
    for read in (AUDIO.decode, AUDIO.inspect):
        assert "truncated" in reason(cut(path, fraction, tmp_path / f"cut.{name}"), read) or name == "caf"


def test_a_length_that_the_writer_did_not_know_is_no_fault(tmp_path):
    data = bytearray(write_sound(tmp_path / "x.wav", ramp(4000), 8000, "FLOAT").read_bytes())
    at = data.index(b"data") + 4
    data[4:8] = data[at : at + 4] = b"\xff\xff\xff\xff"
    (tmp_path / "piped.wav").write_bytes(data)
    assert AUDIO.inspect(str(tmp_path / "piped.wav")) == (0.5, 8000, 1)


def test_a_flac_file_of_unknown_length_is_refused_everywhere(tmp_path):
    data = bytearray(write_sound(tmp_path / "x.flac", noise(0.5, 8000), 8000).read_bytes())
    # The last 36 bits of the first 18 bytes of STREAMINFO (RFC 9639, section 8.2), up to the checksum: samples in all.
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    path = tmp_path / "piped.flac"
    path.write_bytes(data)
    for read in (AUDIO.decode, AUDIO.inspect, views):
        assert reason(path, read) == "its header does not say how long it is"


@pytest.mark.parametrize("suffix", ["wav", "mp3", "ogg", "flac"])
def test_what_is_no_sound(tmp_path, suffix, capfd):
    path = tmp_path / f"x.{suffix}"
    path.touch()
    assert reason(path) == "empty file"
    path.write_text("hello, I am a text\n" * 400)
    assert reason(path) == "not a sound"
    path.write_bytes(np.random.default_rng(0).bytes(100_000))
    assert reason(path) == "not a sound"
    path.unlink()
    assert reason(path) == "no such file"
    path.mkdir()
    assert reason(path) == "is a folder"
    assert capfd.readouterr() == ("", "")


def test_other_kinds_of_data_that_the_library_reads_are_no_sounds_here(tmp_path):
    soundfile.write(tmp_path / "x.wav", ramp(100), 8000, format="MAT5", subtype="FLOAT")
    assert reason(tmp_path / "x.wav") == "not a sound that is read here: MAT5"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_no_numbers(tmp_path, value):
    samples = noise(0.5, 8000, 2)
    samples[3000, 1] = value
    path = write_sound(tmp_path / "x.wav", samples, 8000, "FLOAT")
    for read in (AUDIO.decode, AUDIO.inspect):
        assert reason(path, read) == "samples that are no numbers (NaN or Inf)"


def test_a_sound_without_samples(tmp_path):
    assert reason(write_sound(tmp_path / "x.wav", np.zeros(0, np.float32))) == "no samples in it"


def test_absurdly_loud_samples(tmp_path):
    samples = noise(0.5, 8000, 2)
    samples[3000] = (1e30, -1e30)  # whose average is nothing
    path = write_sound(tmp_path / "x.wav", samples, 8000, "FLOAT")
    for read in (AUDIO.decode, AUDIO.inspect, views, lambda path: AUDIO.moments(path, AudioSignal(**SMALL))):
        assert reason(path, read) == "samples far beyond full scale (1e+30)"


def test_floats_that_hold_integers_are_no_fault(tmp_path):
    path = write_sound(tmp_path / "x.wav", noise(0.5, 8000) * 2**31, 8000, "FLOAT")
    assert np.isfinite(AUDIO.moments(str(path), AudioSignal(**SMALL))).all()


def test_absurd_lengths(tmp_path, monkeypatch):
    path = write_sound(tmp_path / "x.wav", ramp(1000), 8000)
    monkeypatch.setattr(audio_read, "MAX_SAMPLES", 999)
    assert reason(path, audio_read.read).startswith("absurdly long")


def test_a_wrong_suffix_is_harmless(tmp_path):
    write_sound(tmp_path / "x.flac", tone(0.1)).rename(tmp_path / "x.mp3")
    assert AUDIO.inspect(str(tmp_path / "x.mp3")) == (0.1, 16000, 1)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_a_piece_of_a_file_is_that_part_of_the_whole(tmp_path, suffix):
    path = write_sound(tmp_path / f"x.{suffix}", noise(3, 16000), 16000)
    whole = AUDIO.decode(str(path)).waveform
    for fragment, part in {"1.25,2": slice(20000, 32000), "2.5": slice(40000, None), ",0.5": slice(8000)}.items():
        torch.testing.assert_close(AUDIO.decode(f"{path}#t={fragment}").waveform, whole[part], rtol=0, atol=1e-6)
    assert AUDIO.inspect(f"{path}#t=1,2.5") == (1.5, 16000, 1)
    assert len(AUDIO.decode(f"{path}#t=2,99").waveform) == 16000
    assert reason(f"{path}#t=3,4") == "nothing between 3 s and 4 s: it lasts 3 s"


def test_what_cannot_be_sought_in_is_read_from_its_beginning(tmp_path):
    path = write_sound(tmp_path / "x.wav", noise(2, 8000), 8000, "GSM610")
    whole = AUDIO.decode(str(path)).waveform
    assert torch.equal(AUDIO.decode(f"{path}#t=1,1.5").waveform, whole[8000:12000])


FILTER = {"lowpass_filter_width": audio_read.ZEROS, "rolloff": audio_read.ROLLOFF}


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000, 96000])
def test_a_piece_of_the_resampled_sound_needs_no_more_than_its_surroundings(tmp_path, rate):
    samples = noise(1.5, rate)[:, 0]
    path = write_sound(tmp_path / "x.wav", samples, rate, "FLOAT")
    whole = resample(torch.from_numpy(samples), rate, 16000, **FILTER)
    total = resampled_length(len(samples), rate, 16000)
    assert len(whole) == total
    with opened(str(path)) as source:
        read, spans = source.read, []
        source.read = lambda start, stop: spans.append(stop - start) or read(start, stop)
        for start, count in [(0, 4000), (1, 1), (7777, 3200), (total - 4000, 4000), (0, total), (total - 1, 1)]:
            got = piece(source, start, count, 16000)
            torch.testing.assert_close(got, whole[start : start + count], rtol=0, atol=1e-5)
            assert spans[-1] <= count * rate / 16000 + 3 * rate / math.gcd(rate, 16000) + 80 * max(1, rate / 16000)


@pytest.mark.parametrize("rate", [1, 7919, 15999, 44101, 767999])
def test_rates_without_a_common_factor(tmp_path, rate):
    samples = noise(max(0.3, 40 / rate), rate)[:, 0]
    path = write_sound(tmp_path / "x.wav", samples, rate, "FLOAT")
    total = resampled_length(len(samples), rate, 8009)
    whole = audio_read.resampled(torch.from_numpy(samples), rate, 8009)
    assert len(whole) == total
    with opened(str(path)) as source:
        for start, count in [(0, 2000), (1, 1), (777, 800), (total - 900, 900), (0, total), (total - 1, 1)]:
            got = piece(source, start, count, 8009)
            torch.testing.assert_close(got, whole[start : start + count], rtol=0, atol=1e-6)
    (sample,) = views(path, sample_rate=8009)
    assert sample["signal"].isfinite().all()
    AUDIO.eval_transform(AudioSignal(sample_rate=8009), PATCH)(AUDIO.decode(str(path)))


@pytest.mark.parametrize("rates", [(11025, 8000), (8000, 11025), (44100, 16000), (8000, 16000), (16000, 8000)])
def test_the_filter_is_the_same_where_it_is_not_kept(rates, monkeypatch):
    samples = torch.from_numpy(noise(0.3, rates[0])[:, 0])
    monkeypatch.setattr(audio_read, "_resampler", lambda rate, target: None)
    monkeypatch.setattr(audio_read, "TAPS_AT_ONCE", 10_000)
    # In float64, for torchaudio's float32 kernels are rounded coarsely.
    expected = resample(samples.double(), *rates, **FILTER).float()
    torch.testing.assert_close(audio_read.resampled(samples, *rates), expected, rtol=0, atol=1e-6)


def test_the_kernel_of_a_long_sound_is_worked_out_once_for_every_place(monkeypatch):
    sinc, values = torch.sinc, []
    monkeypatch.setattr(torch, "sinc", lambda x: values.append(x.numel()) or sinc(x))
    samples = torch.from_numpy(noise(1.0, 7919)[:, 0])
    long = audio_read.resampled(samples.repeat(3), 7919, 8009)
    once = sum(values)
    monkeypatch.setattr(audio_read, "MAX_TABLE", 0)
    torch.testing.assert_close(audio_read.resampled(samples.repeat(3), 7919, 8009), long, rtol=0, atol=0)
    assert sum(values) - once == 3 * once


def test_what_a_file_cannot_hold_is_not_there_at_a_higher_rate():
    tone = torch.sin(2 * math.pi * 3600 * torch.arange(8000) / 8000)
    spectrum = torch.fft.rfft(audio_read.resampled(tone, 8000, 16000) * torch.hann_window(16000)).abs()
    assert spectrum[3600] > 3900
    assert spectrum[4000:].max() < 3e-3 * spectrum[3600]


def views(path, seeds=(0,), **settings):
    signal = AudioSignal(**{**SMALL, "fill": "repeat", **settings})
    (size,) = AUDIO.sizes(signal, AudioTokenizer())
    reader = pickle.loads(pickle.dumps(AUDIO.views(signal)))
    return reader(str(path), [np.random.default_rng(seed) for seed in seeds], size)


def test_training_pieces_lie_inside_of_the_file_and_everywhere_in_it(tmp_path):
    path = write_sound(tmp_path / "x.wav", ramp(4000), 8000, "FLOAT")
    starts = []
    for sample in views(path, range(60)):
        where = places(sample["signal"])
        assert where.shape == (1, 2680)  # 32 frames: 31 hops of 80 samples and a window of 200
        assert torch.equal(where[0], where[0, 0] + torch.arange(2680))
        starts.append(int(where[0, 0]))
    assert 0 <= min(starts) < 200 < 1100 < max(starts) <= 1320
    inside = views(f"{path}#t=0.1,0.45", range(20))
    assert all(800 <= places(sample["signal"]).min() <= places(sample["signal"]).max() < 3600 for sample in inside)


def test_a_seed_decides_whatever_else_is_made_of_the_file(tmp_path):
    path = write_sound(tmp_path / "x.wav", noise(2, 11025), 11025)
    settings = {"gain_db": 6.0, "spec_mask": SpecMask(time=8, frequency=8)}
    together = views(path, (3, 4), **settings)
    for seed, sample in zip((3, 4), together, strict=True):
        (alone,) = views(path, (seed,), **settings)
        assert alone.keys() == sample.keys() == {"signal", "spec_mask"}
        assert all(torch.equal(alone[key], sample[key]) for key in alone)
    assert not torch.equal(together[0]["signal"], together[1]["signal"])


def test_short_files_are_padded_and_say_so(tmp_path):
    short = write_sound(tmp_path / "short.wav", 1 + ramp(1000), 8000, "FLOAT")
    (sample,) = views(short, fill="pad")
    assert sample["length"] == 1000
    assert (sample["signal"][0, :1000] >= 1).all()
    assert (sample["signal"][0, 1000:] == 0).all()
    long = write_sound(tmp_path / "long.wav", ramp(4000), 8000, "FLOAT")
    assert views(long, fill="pad")[0]["length"] == 2680
    resampled = write_sound(tmp_path / "other.wav", noise(0.1, 11025), 11025)
    assert views(resampled, fill="pad")[0]["length"] == math.ceil(1102 * 8000 / 11025)


def test_short_files_go_round_from_anywhere(tmp_path):
    path = write_sound(tmp_path / "x.wav", ramp(1000), 8000, "FLOAT")
    starts = set()
    for sample in views(path, range(20)):
        assert sample.keys() == {"signal"}
        where = places(sample["signal"])[0]
        assert torch.equal(where, (where[0] + torch.arange(2680)) % 1000)
        starts.add(int(where[0]))
    assert len(starts) > 15


def test_gain_stays_in_its_range(tmp_path):
    path = write_sound(tmp_path / "x.wav", np.full(4000, 0.1, np.float32), 8000, "FLOAT")
    gains = [20 * math.log10(sample["signal"][0, 0] / 0.1) for sample in views(path, range(50), gain_db=6.0)]
    assert -6.01 < min(gains) < -4
    assert 4 < max(gains) < 6.01


def test_spec_augment_draws_widths_and_places_from_the_generator_alone():
    mask = SpecMask(time=10, frequency=4)
    drawn = torch.stack([mask.draw(np.random.default_rng(seed), 32, 16) for seed in range(400)])
    start, stop, low, high = drawn.unbind(1)
    assert set((stop - start).tolist()) == set(range(11))
    assert set((high - low).tolist()) == set(range(5))
    assert (start.min(), stop.max(), low.min(), high.max()) == (0, 32, 0, 16)
    torch.manual_seed(1)
    assert torch.equal(mask.draw(np.random.default_rng(5), 32, 16), drawn[5])
    assert SpecMask(time=3).draw(np.random.default_rng(0), 32, 16)[2:].diff() == 0
    assert not SpecMask().active


def test_broken_files_break_training_pieces(tmp_path):
    path = write_sound(tmp_path / "x.wav", noise(1, 8000), 8000)
    with pytest.raises(BrokenFile, match="truncated"):
        views(cut(path, 0.5))


def evaluated(samples, **settings):
    signal = AudioSignal(**{**SMALL, **settings})
    return AUDIO.eval_transform(signal, PATCH)(Sound(torch.from_numpy(ramp(samples)), 8000))


@pytest.mark.parametrize(("samples", "frames"), [(1400, 16), (1479, 16), (2679, 16), (2680, 32), (2759, 32)])
def test_evaluation_cuts_to_whole_patches(samples, frames):
    x = evaluated(samples)
    assert torch.equal(places(x), torch.arange(filterbank(AudioSignal(**SMALL)).samples(frames)).unsqueeze(0))


@pytest.mark.parametrize("samples", [1, 100, 1399])
def test_a_sound_shorter_than_a_patch_is_followed_by_silence(samples):
    x = evaluated(samples)
    assert x.shape == (1, 1400)
    assert torch.equal(places(x[0, :samples]), torch.arange(samples))
    assert (x[0, samples:] == 0).all()


@pytest.mark.parametrize("samples", [4000, 5320, 8000, 12345])
@pytest.mark.parametrize("longest", [None, 0.16, 0.5])
def test_long_sounds_become_equal_pieces_that_leave_nothing_out(samples, longest):
    x = evaluated(samples, longest=longest)
    most = round((longest or 0.32) * 100) // 16 * 16
    log_mel = filterbank(AudioSignal(**SMALL))
    frames = log_mel.frames(samples)
    if frames <= most:
        assert x.shape == (1, log_mel.samples(frames // 16 * 16))
        return
    assert x.shape[:2] == (math.ceil(frames / most), 1)
    assert log_mel.frames(x.shape[2]) % 16 == 0
    assert log_mel.frames(x.shape[2]) <= most
    where = places(x)[:, 0]
    assert (where.diff(dim=1) == 1).all()
    assert (where[0, 0], where[-1, -1]) == (0, log_mel.samples(frames) - 1)
    assert (where[1:, 0] <= where[:-1, -1]).all()  # no frame is left out


def test_evaluation_resamples(tmp_path):
    samples = noise(0.5, 44100)[:, 0]
    path = write_sound(tmp_path / "x.wav", samples, 44100, "FLOAT")
    x = AUDIO.eval_transform(AudioSignal(**SMALL, longest=9), PATCH)(AUDIO.decode(str(path)))
    torch.testing.assert_close(x[0], resample(torch.from_numpy(samples), 44100, 8000, **FILTER)[: x.shape[1]])
    with pytest.raises(TypeError, match="a decoded sound or a float tensor is needed, but got ndarray"):
        AUDIO.eval_transform(AudioSignal(), PATCH)(samples)


def test_moments_are_those_of_the_log_mel_spectrogram(tmp_path):
    path = write_sound(tmp_path / "x.wav", noise(1, 8000), 8000, "FLOAT")
    signal = AudioSignal(**SMALL)
    values = filterbank(signal)(AUDIO.decode(str(path)).waveform[None]).double()
    count, total, squares = AUDIO.moments(str(path), signal)[0]
    assert count == values.numel()
    assert total / count == pytest.approx(float(values.mean()), rel=1e-6)
    assert squares / count - (total / count) ** 2 == pytest.approx(float(values.var(unbiased=False)), rel=1e-6)
    write_sound(path, noise(0.02, 8000), 8000)
    with pytest.raises(BrokenFile, match="shorter than one window of 25 ms"):
        AUDIO.moments(str(path), signal)


def test_a_picture_has_low_frequencies_at_the_bottom_and_hidden_parts_grey():
    signal = AudioSignal(**SMALL)
    x = torch.full((1, 32, 48), -0.9)
    x[0, 5] = 0.9
    x[0, 20, :10] = 0.0
    drawn = AUDIO.picture(x, signal)
    assert drawn.shape == (32, 48, 3)
    assert drawn.dtype == np.uint8
    brightness = drawn.astype(int).sum(2)
    assert (brightness[31 - 5] > 550).all()
    assert (brightness[:11] < 30).all()
    assert (drawn[31 - 20, :10] == GREY).all()
    other = AudioSignal(**SMALL, mean=-6.0, std=2.0)
    same = ((x * 9.138 - 4.268) + 6) / 2
    assert np.abs(AUDIO.picture(same, other)[26].astype(int) - drawn[26]).max() <= 1


def test_a_lattice_is_arranged_as_the_picture_is():
    values = np.arange(6 * 2).reshape(6, 2)
    arranged = AUDIO.lattice(values, (2, 3))
    assert arranged[..., 0].tolist() == [[6, 8, 10], [0, 2, 4]]


def test_axes_point_at_what_the_picture_shows():
    signal = AudioSignal(sample_rate=16000, seconds=1.28)
    log_mel = filterbank(signal)
    for hertz in (250, 1000, 4000):
        spectrogram = log_mel(torch.from_numpy(tone(1.4, 16000, hertz)[:, 0])[None])
        axes = AUDIO.axes(spectrogram, signal)
        row = {label: place for place, label in axes.hertz}[str(hertz)]
        loudest = 127 - int(spectrogram[0].mean(1).argmax())
        assert abs(row - (loudest + 0.5)) <= 1.5
    assert [label for _, label in axes.seconds] == ["0", "0.2", "0.4", "0.6", "0.8", "1", "1.2"]
    assert axes.seconds[5][0] == 100
    assert [label for _, label in axes.hertz] == ["125", "250", "500", "1000", "2000", "4000"]


@pytest.mark.parametrize("seconds", [0.16, 0.5, 1, 3, 10.24, 59, 3600])
def test_there_are_a_handful_of_ticks(seconds):
    times = AUDIO.axes(torch.zeros(1, 128, round(seconds * 100)), AudioSignal()).seconds
    assert 5 <= len(times) <= 13
    assert all(place <= seconds * 100 for place, _ in times)


def test_a_spectrogram_can_be_heard():
    signal = AudioSignal(**SMALL)
    wave = torch.from_numpy(tone(0.335, 8000, 1000)[:, 0])
    x = (filterbank(signal)(wave[None]) - signal.mean[0]) / signal.std[0]
    samples, rate = AUDIO.sound(x, signal)
    assert (rate, samples.shape, samples.dtype) == (8000, (2680,), torch.float32)
    assert abs(int(torch.fft.rfft(samples).abs().argmax()) * 8000 / 2680 - 1000) < 30


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seconds": 0}, "seconds: input should be greater than 0"),
        ({"seconds": 0.001}, "seconds 0.001 is shorter than hop_ms 10"),
        ({"seconds": 1e300}, r"seconds: input should be less than or equal to 86400, but got 1e\+300"),
        ({"hop_ms": 1e300}, "hop_ms: input should be less than or equal to 1000"),
        ({"window_ms": 1e300}, "window_ms: input should be less than or equal to 1000"),
        ({"std": "nan"}, "std.*: input should be a finite number, but got 'nan'"),
        ({"mean": math.nan}, "mean.*: input should be a finite number, but got nan"),
        ({"mean": "loud"}, "mean.*: input should be a valid number"),
        ({"std": 0}, "std: must be greater than 0, but got 0"),
        ({"std": [1, 2]}, "std"),
        ({"fill": "loop"}, "fill: 'loop' is not valid"),
        ({"high_hz": 9000}, r"128 mel filters from 20\.0 to 9000\.0 Hz do not fit in 0 to 8000\.0 Hz"),
        ({"window_ms": 0.01}, r"windows of 0\.01 ms"),
        ({"spec_mask": {"time": 1024}}, "spec_mask must leave something of 1024 frames and 128 mel bins"),
        ({"sample_rat": 8000}, "'sample_rat' is not a key; did you mean 'sample_rate'"),
    ],
)
def test_wrong_settings_get_a_sentence(settings, message):
    with pytest.raises(UserError, match=message):
        validate(AudioSignal, settings, "recipe")


def test_one_number_is_a_square_or_a_channel():
    assert AudioTokenizer(patch_size=8).patch_size == (8, 8)
    assert AudioSignal(mean=-6).mean == (-6.0,)
    assert AudioSignal(std="1e-3").std == (0.001,)
    with pytest.raises(UserError, match="patch_size: both sides must be greater than 0"):
        validate(AudioTokenizer, {"patch_size": 0}, "recipe")


def test_decoding_happens_in_another_process(tmp_path, monkeypatch):
    path = write_sound(tmp_path / "x.wav", tone(0.1))
    monkeypatch.setattr("modalities.audio.isolated", lambda function, path, timeout: (function.__name__, timeout))
    assert AUDIO.decode(str(path)) == ("read", None)
    assert AUDIO.inspect(str(path)) == ("info", None)

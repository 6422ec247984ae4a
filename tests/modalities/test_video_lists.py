"""What FFmpeg reads of a video file is that file: not what a list of other files, or of streams, names.

Planted bugs that fail here: every demuxer allowed, the demuxer of MPEG program streams left out.
"""

import os

import pytest
from media import numbered, write_video

from mmssl.data.guard import BrokenFile
from mmssl.data.isolate import isolated
from modalities.video_read import VIDEO_FILES, open_video
from modalities.video_stream import Decord

HLS = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:10\n#EXTINF:2,\n{}\n#EXT-X-ENDLIST\n"
MPD = (
    '<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
    'profiles="urn:mpeg:dash:profile:isoff-on-demand:2011" mediaPresentationDuration="PT2S" minBufferTime="PT1S">'
    '<Period start="PT0S"><AdaptationSet mimeType="video/mp4" contentType="video"><Representation id="1" '
    'bandwidth="1000" codecs="avc1.4d401f" width="64" height="64"><BaseURL>{}</BaseURL></Representation>'
    "</AdaptationSet></Period></MPD>"
)
SDP = "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5555 RTP/AVP 96\na=rtpmap:96 H264/90000\n"
LISTS = {
    "ffconcat.ts": "ffconcat version 1.0\nfile neighbour.ts\n",
    "hls.m3u8": HLS,
    "hls.ts": HLS,
    "mpd.mp4": MPD,
    "sdp.mp4": SDP,
    "neighbour.idx": "# VobSub index file, v7 (do not modify this line!)\n",
}
CODECS = {
    ".mpg": "mpeg1video", ".mpeg": "mpeg2video", ".ts": "mpeg2video", ".wmv": "wmv2", ".flv": "flv", ".ogv": "libvpx",
    ".m4v": "mpeg4", ".3gp": "h263",
}  # fmt: skip


def opened(path):
    with open_video(path) as video:
        return video.frames


@pytest.mark.parametrize("name", LISTS)
def test_lists_of_files_are_no_videos_and_nothing_else_is_opened(tmp_path, name):
    # Whoever opens a pipe waits for somebody who writes into it.
    for neighbour in ("neighbour.ts", "neighbour.sub"):
        os.mkfifo(tmp_path / neighbour)
    (tmp_path / name).write_text(LISTS[name].format(tmp_path / "neighbour.ts"))
    with pytest.raises(BrokenFile, match=r"^not a video$"):
        isolated(opened, str(tmp_path / name), 10.0)


@pytest.mark.parametrize("name", LISTS)
def test_decord_gets_no_list_either(tmp_path, name):
    pytest.importorskip("decord")
    video = write_video(tmp_path / "a.mp4", numbered(4))
    with open_video(str(video), decoder="decord") as reader:
        assert isinstance(reader, Decord)
        video.write_text(LISTS[name].format(tmp_path / "neighbour.ts"))
        with pytest.raises(BrokenFile, match=r"^not a video$"):
            reader.read([0])


@pytest.mark.parametrize("suffix", sorted(VIDEO_FILES.suffixes - {".gif"}))
def test_every_suffix_is_read(tmp_path, suffix):
    video = write_video(tmp_path / f"a{suffix}", numbered(5, 144, 176), codec=CODECS.get(suffix))
    assert opened(str(video)) == 5

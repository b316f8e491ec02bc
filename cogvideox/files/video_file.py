"""Write and read encoded videos."""

import contextlib
import itertools
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogvideox.errors import UserError, first_line

if TYPE_CHECKING:
    import numpy as np


def video_comment(path: Path) -> str:
    """Return the comment in a video's metadata; {} if there is none, or if ffmpeg cannot read the video."""
    from imageio_ffmpeg import get_ffmpeg_exe

    command = [get_ffmpeg_exe(), "-v", "quiet", "-i", path, "-f", "ffmetadata", "-"]
    process = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    lines = re.findall(r"^comment=(.*)$", process.stdout.decode(errors="replace"), re.M)
    # ffmpeg puts a backslash before some characters.
    return re.sub(r"\\(.)", r"\1", lines[0]) if lines else "{}"


def read_video(path: Path) -> "np.ndarray":
    """Read the frames of a video, uint8 [frames, height, width, 3]; raises UserError where it cannot be read."""
    import imageio.v3 as imageio

    try:
        return imageio.imread(path)
    except (OSError, ValueError, RuntimeError, StopIteration) as error:
        raise UserError(f"cannot read the video {path}: {str(error).strip().splitlines()[0]}") from error


def first_frames(path: Path, number: int, height: int, width: int) -> "np.ndarray":
    """Read the first frames of a video, in this size, uint8 [frames, height, width, 3]; fewer if there are not so many.

    They are resized as by diffusers' `VideoProcessor.preprocess_video`.

    Raises:
        UserError: there is no such file, or ffmpeg cannot read it.
    """
    import imageio.v2 as imageio
    import numpy as np
    from PIL import Image

    if not path.is_file():  # a pipe would be waited for
        raise UserError(f"{path} does not exist, or is no file; name a video")
    frames = np.empty((number, height, width, 3), np.uint8)
    found = 0
    try:
        reader: Any = imageio.get_reader(path, format="FFMPEG")
        with contextlib.closing(reader):
            for frame in itertools.islice(reader, number):
                frames[found] = np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS))
                found += 1
    except (OSError, ValueError, RuntimeError, IndexError) as error:
        raise UserError(
            f"{path} is no video that ffmpeg can read: {first_line(error)}; a picture is for --image"
        ) from error
    return frames[:found]


def check_ffmpeg() -> None:
    """Raise UserError, with ffmpeg's own reason, unless there is an ffmpeg that runs and encodes H.264."""
    from imageio_ffmpeg import _io as writer  # which takes the first encoder that works

    frame = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "256x256", "-i", "-"]  # of zeros
    try:
        for encoder in (*writer.get_compiled_h264_encoders(), "libx264"):
            command = [writer.get_ffmpeg_exe(), "-v", "error", *frame, "-c:v", encoder, "-f", "null", "-"]
            process = subprocess.run(command, input=bytes(256 * 256 * 3), capture_output=True, check=False)
            if process.returncode == 0:
                return
    except (OSError, RuntimeError, IndexError) as error:  # the last where it prints no list
        raise UserError(f"ffmpeg, which encodes the video, does not run: {first_line(error)}; install it") from error
    reason = first_line(Exception(process.stderr.decode(errors="replace")))
    raise UserError(f"ffmpeg cannot encode H.264: {reason}; install one that can, such as with libx264")


@contextlib.contextmanager
def video_writer(path: str, fps: float, comment: str = "") -> Iterator[Callable]:
    """Yield a function that appends a frame, uint8 [height, width, 3], to the H.264 video `path`.

    The comment comes into the metadata of the video.

    Raises:
        OSError: not all frames were written.
    """
    import imageio.v2 as imageio
    from imageio_ffmpeg import count_frames_and_secs

    appended = 0

    def append(frame: "np.ndarray") -> None:
        nonlocal appended
        writer.append_data(frame)
        appended += 1

    try:
        # These are the settings of diffusers.utils.export_to_video, except macro_block_size, to multiples of which the
        # size is rounded up: H.264 needs only even sizes, and ours are even.
        settings: dict[str, Any] = {"quality": 5.0, "macro_block_size": 2, "ffmpeg_log_level": "quiet"}
        metadata = ["-metadata", f"comment={comment}"]
        writer = imageio.get_writer(path, format="FFMPEG", fps=fps, output_params=metadata, **settings)
        # The writer's own `with` leaves ffmpeg running after an error, and that makes the file anew once it is removed.
        with contextlib.closing(writer):
            yield append
        # imageio does not check how ffmpeg ended: on a full disk, half a file may be left without an error.
        written, _ = count_frames_and_secs(path)
    except (OSError, RuntimeError):
        written = 0
    if written != appended or not appended:
        raise OSError(f"the encoder wrote {written} of {appended} frames")

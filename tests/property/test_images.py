"""Whatever the file: an image that is right, or an error of the user that names the file."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qmixlora.data.formats import ImageFile
from qmixlora.data.images.files import locate
from qmixlora.data.images.opening import check_body, check_header, image_size, open_images
from qmixlora.errors import UserError

from .images import damaged_bytes, image_bytes

MANY = settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
MOST = 10**6  # pixels


@contextmanager
def silence() -> Iterator[None]:
    """Fails if anything is written to stderr, by libraries in C too, or a warning is given."""
    with tempfile.TemporaryFile() as file, warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
        file.seek(0)
        assert not file.read()


def opened(file: ImageFile) -> tuple[int, int] | None:
    """The size of an image that is right; None if it is refused, with its place."""
    try:
        with silence():
            size = check_header(file, MOST, named_by="row 3")
            assert check_body(file, MOST, named_by="row 3") == size
            [image] = open_images([file])
    except UserError as error:
        assert "row 3" in error.where and str(file["path"]) in error.where and "object at 0x" not in str(error)
        return None
    assert image.mode == "RGB" and image.size == size == image_size(file) and min(size) >= 1
    return size


@MANY
@given(image_bytes())
def test_a_whole_file_is_an_image(content: bytes) -> None:
    assert opened({"path": "a.parquet, bytes", "bytes": content}) is not None


@MANY
@given(damaged_bytes())
def test_a_damaged_file_is_an_image_or_is_named(content: bytes) -> None:
    opened({"path": "a.parquet, bytes", "bytes": content})


@settings(MANY, max_examples=100)
@given(image_bytes())
def test_a_whole_file_on_the_disk_is_what_its_bytes_are(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.png"
        path.write_bytes(content)
        [on_disk, in_memory] = open_images([{"path": str(path), "bytes": None}, {"path": str(path), "bytes": content}])
    assert on_disk.size == in_memory.size and on_disk.tobytes() == in_memory.tobytes()


@settings(MANY, max_examples=100)
@given(damaged_bytes() | st.binary(max_size=200))
def test_a_damaged_file_on_the_disk_is_an_image_or_is_named(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.png"
        path.write_bytes(content)
        opened({"path": str(path), "bytes": None})


@MANY
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.binary() | st.text(),
        lambda values: (
            st.lists(values, max_size=2)
            | st.dictionaries(st.sampled_from(["path", "bytes", "url", "image_url"]) | st.text(), values, max_size=3)
        ),
    )
    | st.text().map("data:image/png;base64,{}".format)
    | st.text().map("file://{}".format)
    | st.text().map("https://{}".format)
    | st.text(alphabet="abcXYZ019+/=_-", min_size=20)
)
def test_whatever_a_row_gives_is_a_file_or_is_refused_with_the_row(image: object) -> None:
    with tempfile.TemporaryDirectory() as folder, silence():
        try:
            file = locate(image, Path(folder), "data.json, row 3")
        except UserError as error:
            assert "data.json, row 3" in error.where
            str(error).encode()  # a terminal can show it
        else:
            assert file["bytes"] and "data.json, row 3" in str(file["path"])

"""Buffers and the files that hold them."""

from __future__ import annotations

import tempfile
import unittest
from pathlib import Path

from olla import Buffer, InvalidBuffersError
from olla.place.buffers import read_csv, write_csv


class BufferTest(unittest.TestCase):
    def test_what_cannot_be(self) -> None:
        cases = [
            ((2, 2, 1), {}, "lives from 2 to 2: upper must be above lower"),
            ((0, 1, -1), {}, "negative size -1"),
            ((0, 1, 2**60), {}, "above 2"),
            ((0, 1, 1), {"alignment": 0}, "alignment 0"),
            ((0, 1, 1), {"alignment": 4, "offset": 6}, "fixed offset 6: it must be a multiple of 4"),
            ((0, 1, 1), {"offset": -1}, "fixed offset -1"),
            ((0, 1, 1.5), {}, "not an integer"),
        ]
        for numbers, others, message in cases:
            with self.subTest(message), self.assertRaisesRegex(InvalidBuffersError, f"buffer 'x' .*{message}"):
                Buffer(*numbers, **others, name="x")


class CsvTest(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.path = Path(folder.name) / "buffers.csv"

    def read(self, text: str) -> list[Buffer]:
        self.path.write_text(text)
        return read_csv(self.path)

    def test_columns_may_be_left_out_and_stand_in_any_order(self) -> None:
        self.assertEqual(self.read("size,lower,upper\n5,0,2\n"), [Buffer(0, 2, 5, name="0")])
        self.assertEqual(
            self.read("id,lower,upper,size,alignment,offset\na, 0,2,5,4,8\nb,1,3,6,,\n"),
            [Buffer(0, 2, 5, 4, 8, name="a"), Buffer(1, 3, 6, name="b")],
        )

    def test_what_was_written_is_read(self) -> None:
        buffers = [Buffer(0, 2, 5, 4, name="a"), Buffer(1, 3, 6, name="b")]
        write_csv(self.path, buffers, (8, 0))
        self.assertEqual(read_csv(self.path), [Buffer(0, 2, 5, 4, 8, "a"), Buffer(1, 3, 6, 1, 0, "b")])

    def test_errors_name_the_line(self) -> None:
        head = "id,lower,upper,size\n"
        cases = [
            ("", "line 1: the columns must be"),
            ("id,lower,size\n", "line 1: the columns must be"),
            ("id,lower,upper,size,colour\n", "line 1: the columns must be"),
            (head + "a,0,1,1\nb,0,1\n", "line 3: 3 values for 4 columns"),
            (head + "a,0,x,1\n", "line 2: 'x' is not an integer"),
            (head + "a,0,,1\n", "line 2: .*upper"),
            (head + "a,3,1,1\n", "line 2: buffer 'a' lives from 3 to 1"),
            (head + "a,0,1,1\n\na,0,1,1\n", "line 4: the id 'a' occurs twice"),
        ]
        for text, message in cases:
            with self.subTest(message), self.assertRaisesRegex(InvalidBuffersError, message):
                self.read(text)

    def test_a_file_that_is_no_text(self) -> None:
        self.path.write_bytes(b"\xff\xfe\x00")
        with self.assertRaisesRegex(InvalidBuffersError, "not a text file"):
            read_csv(self.path)

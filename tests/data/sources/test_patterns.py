import pytest

from mpp.data.sources.base import SourceError
from mpp.data.sources.patterns import expand_braces, shown, split_patterns
from mpp.data.sources.shards import open_shards
from tests.data.sources.reading import all_read
from tests.data.sources.tar_shards import write_tar


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.tar", ["a.tar"]),
        ("a-{08..11}.tar", ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]),
        ("{x,y}/{0..1}", ["x/0", "x/1", "y/0", "y/1"]),
        ("a{,-b}.tar", ["a.tar", "a-b.tar"]),
        ("a{2..0}", ["a2", "a1", "a0"]),
    ],
)
def test_braces(pattern, expected):
    assert list(expand_braces(pattern)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/a/*.tar", ["/a/*.tar"]),
        (" /a/*.tar\n s3://b/x-{000..123}.tar ", ["/a/*.tar", "s3://b/x-{000..123}.tar"]),
        (r"/my\ data/*.tar /b/{c d,e}.tar", ["/my data/*.tar", "/b/{c d,e}.tar"]),
        (r"/a\b.tar", [r"/a\b.tar"]),
        ("", []),
        (" ", []),
    ],
)
def test_patterns(text, expected):
    assert split_patterns(text) == expected


def test_several_patterns(tmp_path):
    (tmp_path / "one two").mkdir()
    (tmp_path / "three").mkdir()
    first = write_tar(tmp_path / "one two" / "a b.tar", [("a.jpg", b"a")])
    write_tar(tmp_path / "three" / "c.tar", [("c.jpg", b"c")])
    for pattern in (str(first), f"{tmp_path}/one two/*.tar", f"{tmp_path}/one*/a\\ b.tar"):
        assert all_read(open_shards("shards", pattern)) == [(b"a", None)]
    both = open_shards("shards", f"{tmp_path}/three/*.tar {tmp_path}/one\\ two/*.tar")
    assert [data for data, _ in all_read(both)] == [b"a", b"c"]
    with pytest.raises(SourceError, match="does not say where"):
        open_shards("shards: ", " ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/data/a?.tar", "/data/a?.tar"),
        ("s3://key:secret@bucket/a-?.tar", "s3://bucket/a-?.tar"),
        ("cannot reach 'https://me:pw@host/a,b.tar?X=1&Y=(2),3' now", "cannot reach 'https://host/a,b.tar' now"),
        ("http://h/a-{0..3}.tar?sig=1 http://u@h/b.tar", "http://h/a-{0..3}.tar http://h/b.tar"),
    ],
)
def test_what_is_shown_of_addresses(text, expected):
    assert shown(text) == expected

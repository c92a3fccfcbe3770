from mpp.curation.check_report import Classes
from mpp.data.sources.in_memory import ListSource


def test_classes_like_splits_and_one_huge_class():
    source = ListSource([b""] * 20, [0] * 17 + [1] * 2 + [2], ("cat", "Val", "dog"))
    classes = Classes.of(source)
    assert classes is not None
    assert classes.warnings() == [
        "classes called Val: if they are splits, give the folder of one of them",
        "the class cat holds 85.0% of the images",
    ]
    even = Classes.of(ListSource([b""] * 4, [0, 0, 0, 1], ("cat", "dog")))
    assert even is not None
    assert even.warnings() == []
    assert Classes.of(ListSource([b""])) is None

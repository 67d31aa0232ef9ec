"""A filter is a pure function of the text, its rules have names that stay, and no mistake of one passes in silence."""

import pickle
import re
import unicodedata
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_core.config.base import Frozen
from dllm_core.data.filters import (
    CATEGORIES,
    UNSPACED_SCRIPTS,
    AnyFilter,
    CharacterFilter,
    ImportedFilter,
    LengthFilter,
    RepetitionFilter,
    category_table,
    first_reason,
)
from dllm_core.errors import ConfigError, DataError

PROSE = (
    "The river rises in the hills, passes three mills and a ford, and reaches the sea by a wide and shallow mouth.\n"
)
HAN = "河从山上流下来经过三座磨坊和一个渡口最后由宽而浅的河口入海沿岸的人们靠它打鱼种稻也靠它运货"
MANY = "".join(f"Sentence {i} speaks of item{i} and thing{i * 7} near place{i * 3}.\n" for i in range(40))
LOOSE = RepetitionFilter(max_line_fraction=1, min_words=0)
UNSPACED = "".join(f"{chr(first)}-{chr(last)}" for first, last in UNSPACED_SCRIPTS)
TEXTS = st.lists(st.sampled_from(["buy", "now", "or", "a", "later", "买", "一送", "\n"]), max_size=24).map(
    " ".join
) | st.text(st.sampled_from("ab \n.漢字ก9"), max_size=60)


class Pipeline(Frozen):
    """A recipe's section as the real one holds filters."""

    filters: tuple[AnyFilter, ...]


@pytest.mark.parametrize(
    ("chosen", "text", "rule"),
    [
        (LengthFilter(min_chars=3), "ab", "length.too_short"),
        (LengthFilter(min_chars=3), "abc", None),
        (LengthFilter(max_chars=3), "abc", None),
        (LengthFilter(max_chars=3), "abcd", "length.too_long"),
        (LengthFilter(), "", "length.too_short"),
        (LengthFilter(min_chars=3, max_chars=3), "漢字語", None),
        (RepetitionFilter(), MANY, None),
        (RepetitionFilter(), MANY + PROSE * 30, "repetition.lines"),
        (RepetitionFilter(max_line_fraction=1), PROSE * 30, None),
        (RepetitionFilter(), "buy now " * 40, "repetition.ngram"),
        (RepetitionFilter(), "buy now " * 20, None),  # 40 words: too few to be judged
        (RepetitionFilter(), HAN, None),
        (RepetitionFilter(), "买一送一" * 30, "repetition.ngram"),
        (RepetitionFilter(), "", None),
        (LOOSE, "buy now or perhaps tomorrow sell it later but buy now", "repetition.ngram"),  # no word alone
        (LOOSE, "one", None),
        (LOOSE, "", None),
        (RepetitionFilter(max_line_fraction=0), "a\n\n\nb\n \n", None),  # blank lines repeat nothing
        (RepetitionFilter(max_line_fraction=0), "a\r\n  a", "repetition.lines"),
        (RepetitionFilter(max_line_fraction=0.3), "a\nbbb\nccc\nbbb", None),  # 3 of 10
        (RepetitionFilter(max_ngram_fraction=0.29, ngram=1), "a " * 29 + " ".join(map(chr, range(0x400, 0x447))), None),
        (CharacterFilter(), PROSE, None),
        (CharacterFilter(), HAN, None),
        (CharacterFilter(), "हिन्दी में लिखा हुआ पाठ", None),
        (CharacterFilter(min_letter_fraction=1), "हिन्दी में लिखा हुआ पाठ", None),  # a third of it are marks
        (CharacterFilter(), "=-=-=-=-=-=-= 12345", "characters.few_letters"),
        (CharacterFilter(), "a\0b" * 10, "characters.control"),
        (CharacterFilter(), "\ue000" + "a" * 20, "characters.control"),
        (CharacterFilter(), "tab\tline\r\nend\f\v", None),
        (CharacterFilter(), "caf\ufffd au lait", "characters.replacement"),
        (CharacterFilter(), "\ufffd\0", "characters.replacement"),
        (CharacterFilter(min_letter_fraction=0.5), "ab12", None),
        (CharacterFilter(min_letter_fraction=0.5), "ab123", "characters.few_letters"),
        (CharacterFilter(min_letter_fraction=0.55), "a" * 55 + "1" * 45, None),
        (CharacterFilter(max_control_fraction=0.29), "a" * 71 + "\0" * 29, None),
        (CharacterFilter(max_replacement_fraction=0.29), "a" * 71 + "\ufffd" * 29, None),
        (CharacterFilter(min_letter_fraction=1), " \u3000\n", None),
        (CharacterFilter(), "", None),
    ],
)
def test_a_rule_keeps_its_name_and_its_border(chosen, text, rule):
    assert chosen.reason(text) == rule


@given(TEXTS, st.integers(1, 4), st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.5, 1.0]))
@settings(deadline=None)
def test_the_ngram_rule_is_that_of_counting_every_ngram(text, ngram, limit):
    words = re.findall(rf"[{UNSPACED}]|[^\s{UNSPACED}]+", text)
    total = sum(map(len, words))
    counts = Counter(tuple(words[i : i + ngram]) for i in range(len(words) - ngram + 1))
    shares = [count * len("".join(gram)) / total for gram, count in counts.items() if count > 1]
    chosen = RepetitionFilter(max_line_fraction=1, max_ngram_fraction=limit, ngram=ngram, min_words=0)
    assert (chosen.reason(text) == "repetition.ngram") == (max(shares, default=0) > limit)


@given(st.lists(st.sampled_from(["a", "bb", "ccc ", " bb", ""]), max_size=12), st.sampled_from([0.0, 0.25, 0.3, 0.5]))
@settings(deadline=None)
def test_the_line_rule_is_the_share_of_later_copies(lines, limit):
    solid = [line.strip() for line in lines if line.strip()]
    again = sum(len(line) for i, line in enumerate(solid) if line in solid[:i])
    total = sum(map(len, solid))
    share = again / total if total else 0
    chosen = RepetitionFilter(max_line_fraction=limit, min_words=10**6)
    assert (chosen.reason("\n".join(lines)) == "repetition.lines") == (share > limit)


@given(st.text(max_size=60) | st.text(st.characters(codec=None), max_size=60), st.sampled_from([0.1, 0.5, 0.9]))
@settings(deadline=None)
def test_characters_are_counted_by_their_unicode_category(text, fraction):
    solid = [c for c in text if c not in "\t\n\v\f\r" and unicodedata.category(c)[0] != "Z"]
    letters = sum(unicodedata.category(c)[0] in "LM" for c in solid)
    control = sum(unicodedata.category(c) in ("Cc", "Co", "Cs") for c in solid)
    replaced = solid.count("\ufffd")
    rule = None
    size = len(solid) or 1
    if solid and letters / size < fraction:
        rule = "characters.few_letters"
    if control / size > 1 - fraction:
        rule = "characters.control"
    if replaced / size > 1 - fraction:
        rule = "characters.replacement"
    chosen = CharacterFilter(
        min_letter_fraction=fraction, max_control_fraction=1 - fraction, max_replacement_fraction=1 - fraction
    )
    assert chosen.reason(text) == rule


def test_every_code_point_has_its_category():
    table = category_table()
    for code in [*range(0, 0x110000, 997), 0x10FFFF, 0xD800, 0xFFFD]:
        assert CATEGORIES[table[code]] == unicodedata.category(chr(code))


def test_scripts_without_spaces_are_ranges_in_order_that_do_not_meet():
    for left, right in pairwise(UNSPACED_SCRIPTS):
        assert left[0] <= left[1] < right[0] <= right[1]


@given(st.lists(st.text(max_size=60), min_size=1, max_size=8), st.randoms())
@settings(deadline=None)
def test_a_filter_is_a_pure_function_of_the_text(texts, random):
    filters = [LengthFilter(min_chars=2), RepetitionFilter(min_words=0), CharacterFilter()]
    before = [first_reason(filters, text) for text in texts]
    order = list(range(len(texts)))
    random.shuffle(order)
    elsewhere = pickle.loads(pickle.dumps(filters))
    for i in order:
        assert first_reason(elsewhere, texts[i]) == before[i]


def test_the_first_filter_that_drops_a_text_names_the_reason():
    short, odd = LengthFilter(min_chars=10), CharacterFilter()
    assert first_reason([short, odd], "...") == "length.too_short"
    assert first_reason([odd, short], "...") == "characters.few_letters"
    assert first_reason([], "...") is None
    assert first_reason([short, odd], PROSE) is None


@pytest.mark.parametrize(
    ("section", "place", "problem"),
    [
        ({"type": "length", "min_chars": 5, "max_chars": 4}, "max_chars", "must be at least min_chars=5"),
        ({"type": "length", "min_chars": -1}, "min_chars", "must be greater than or equal to 0"),
        ({"type": "length", "min_char": 5}, "min_char", "unknown name"),
        ({"type": "characters", "min_letter_fraction": 1.5}, "min_letter_fraction", "must be less than or equal to 1"),
        ({"type": "repetition", "ngram": 0}, "ngram", "must be greater than or equal to 1"),
        ({"type": "lenght"}, "type", "unknown kind"),
    ],
)
def test_a_section_that_cannot_mean_anything_is_refused(section, place, problem):
    with pytest.raises(ConfigError) as caught:
        Pipeline.checked({"filters": [section]}, "corpus")
    assert caught.value.place.startswith("corpus.filters.0.")
    assert caught.value.place.endswith(f".{place}")
    assert caught.value.problem == problem


OUTSIDE = """
made = 0

class NoShouting:
    def __init__(self, limit: float = 0.5, name: str = "lab.shouting"):
        global made
        made += 1
        self.limit, self.name = limit, name

    def reason(self, text):
        return self.name if sum(map(str.isupper, text)) > self.limit * len(text) else None

class Broken(NoShouting):
    def reason(self, text):
        return 1 / 0

class NoFilter:
    pass

instance = NoShouting()
made = 0
"""


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """The name of an importable module that no other test has imported."""
    name = f"lab_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(OUTSIDE)
    (tmp_path / f"{name}_broken.py").write_text("raise RuntimeError('no licence')")
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_a_filter_of_ones_own_is_used_like_the_shipped_ones(outside):
    section = {"type": "imported", "path": f"{outside}:NoShouting", "options": {"limit": 0.4}}
    (chosen,) = Pipeline.checked({"filters": [section]}).filters
    module = __import__(outside)
    assert module.made == 0  # checking a recipe constructs nothing
    again = pickle.loads(pickle.dumps(chosen))
    assert [first_reason([chosen], text) for text in ("STOP here", "stop here")] == ["lab.shouting", None]
    assert again.reason("STOP here") == "lab.shouting"
    assert module.made == 1  # once a process, whatever holds the section
    ImportedFilter(path=f"{outside}:NoShouting", options={"limit": 0.9}).reason("")
    assert module.made == 2  # other options, another filter


@pytest.mark.parametrize(
    ("path", "options", "place", "problem"),
    [
        ("no.such.module:Filter", {}, "path", "cannot be imported (ModuleNotFoundError: No module named 'no')"),
        ("{}_broken:Filter", {}, "path", "cannot be imported (RuntimeError: no licence)"),
        ("{}:Nothing", {}, "path", "cannot be imported (AttributeError: module"),
        ("{}:NoFilter", {}, "path", "is no filter"),
        ("{}:instance", {}, "path", "is no filter"),
        ("{}.NoShouting", {}, "path", "is not an import path"),
        ("os; import sys:x", {}, "path", "is not an import path"),
        ("{}:NoShouting", {"limits": 1}, "options", "do not fit NoShouting"),
    ],
)
def test_an_import_that_cannot_work_is_refused_with_the_remedy_before_anything_starts(
    outside, path, options, place, problem
):
    section = {"type": "imported", "path": path.format(outside), "options": options}
    with pytest.raises(ConfigError) as caught:
        Pipeline.checked({"filters": [{"type": "length"}, section]}, "corpus")
    assert caught.value.place.startswith("corpus.filters.1.")
    assert caught.value.place.endswith(f".{place}")
    assert caught.value.problem.startswith(problem)
    assert caught.value.remedy


@pytest.mark.parametrize("answer", [True, "", "too short: 3 < 5", "x" * 65, 7, b"rule"])
def test_an_answer_that_is_no_rule_name_is_an_error(outside, answer):
    class Odd:
        def reason(self, text):
            return answer

    with pytest.raises(DataError, match=r"filters\.1 \(.*Odd\): gave no rule name"):
        first_reason([LengthFilter(), Odd()], "text")


def test_a_filter_that_raises_is_an_error_that_names_it(outside):
    chosen = ImportedFilter(path=f"{outside}:Broken")
    with pytest.raises(DataError) as caught:
        first_reason([LengthFilter(), chosen], "text")
    assert str(caught.value).startswith(
        f"filters.1 ({outside}:Broken): failed on a text of 4 characters (ZeroDivisionError: division by zero)"
    )
    assert isinstance(caught.value.__cause__, ZeroDivisionError)

"""Name patterns against Python's own `re` on patterns that it can match, and in time on those that it cannot."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from doran_core.support.patterns import NamePattern, name_pattern, pattern_matches_ending

REAL = [
    r".*\.(q|v)_proj",
    r".*layers\.(1[0-9]|2[0-3])\.self_attn\.(q|k|v|o)_proj$",
    r"^(?!.*lm_head).*(proj|fc\d)",
    r"model\.layers\.\d{1,2}\.mlp\.(?:up|down|gate)_proj",
    r"(.*\.|)\d+(?=\.)",
    r"layers\.(\d+)",
    r"h\.(?P<index>\d+?)\.",
    r"[^.]+\.[^.]+",
    r"(?i)Model\.Layers",
    r"(?i:MODEL)\.layers",
    r"\bself_attn\b",
    r"(?<=layers\.)\d",
    r"(?<!self_attn\.)q_proj",
    r".*\.q_proj|lm_head",
    r"(?s).*",
    r"",
    r"\w+(\.\w+)*?\.mlp",
    r"(a|ab)(c|bcd)(d*)",
    r"[^\W\d]+\.\S+",
    r"(?i)[k-s]_?\w|\AMODEL\b.*\Z",
    # As a fine-tuning tool writes it for a model that also sees:
    (
        r"(?:.*?(?:vision|image|visual|patch|text|language).*?(?:layers|h|blocks).*?(?:self_attn|attention|attn|mlp).*?"
        r"(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\."
        r"(?:self_attn|attention|attn|mlp)\.(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)))"
    ),
]
NAMES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.12.self_attn.o_proj",
    "model.layers.23.mlp.up_proj",
    "MODEL.layers.3.mlp.fc1",
    "h.11.attn.c_attn",
    "lm_head",
    "abcd",
    "0",
    "",
    "a.1.2.b",
    "model.language_model.layers.3.self_attn.v_proj",
    "\u017fx",
    "line\nbreak.q_proj\n",
]


def found(pattern, name):
    match = re.search(pattern, name)
    if match is None:
        return None
    return match[0] if not match.re.groups else match[1] or ""


@pytest.mark.parametrize("pattern", REAL)
@pytest.mark.parametrize("name", NAMES)
def test_as_python_on_patterns_that_people_write(pattern, name):
    assert NamePattern(pattern).fullmatch(name) == (re.fullmatch(pattern, name) is not None)
    assert NamePattern(pattern).match(name) == (re.match(pattern, name) is not None)
    assert NamePattern(pattern).find(name) == found(pattern, name)
    if not pattern.startswith("(?i)") and not pattern.startswith("(?s)"):
        expected = re.match(rf"(.*\.)?({pattern})$", name) is not None
        assert pattern_matches_ending(pattern, name) == expected


LOOKS = ["(?=a)", "(?!b)", "(?<=a)"]
ITEMS = st.sampled_from(["a", "b", ".", r"\.", "[ab]", "[^a]", r"\d", r"\w", "^", "$", r"\b", "1", *LOOKS])
PATTERNS = st.recursive(
    ITEMS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"(?:{'|'.join(parts)})"),
        inner.map(lambda part: f"({part})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "+?", "??", "{1,2}", "{0,2}?", "{2}"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        ),
    ),
    max_leaves=6,
)


def repeats_nothing(parsed):
    """Whether a part that may match the empty string is repeated: there Python may stop before the longest match."""
    for operation, argument in parsed:
        if operation in (re._constants.MAX_REPEAT, re._constants.MIN_REPEAT):
            inside = [argument[2]]
            if argument[2].getwidth()[0] == 0:
                return True
        elif operation is re._constants.SUBPATTERN:
            inside = [argument[3]]
        else:
            inside = argument[1] if operation is re._constants.BRANCH else []
        if any(map(repeats_nothing, inside)):
            return True
    return False


@settings(max_examples=400, deadline=None)
@given(PATTERNS, st.text(alphabet="ab.1\n", max_size=7))
def test_as_python_on_any_pattern(pattern, name):
    machine = NamePattern(pattern)
    assert machine.fullmatch(name) == (re.fullmatch(pattern, name) is not None)
    assert machine.match(name) == (re.match(pattern, name) is not None)
    match = re.search(pattern, name)
    assert (machine.find(name) is None) == (match is None)
    if machine.groups == 0 and not repeats_nothing(re._parser.parse(pattern)):
        assert machine.find(name) == found(pattern, name)


@pytest.mark.parametrize(
    "pattern",
    [
        "([a-z._0-9]+)+!",
        "(a|a)*!",
        "(a*)*!",
        "(.*.*.*.*)*!",
        ".*.*.*.*.*.*.*.*.*.*!",
        "(?:a?){60}a{60}!",
        "((((a+)+)+)+)+!",
        "(?=(?:(?:a+)+)+!)a",
        "(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)!",
    ],
)
def test_what_python_never_finishes_takes_no_time(pattern):
    start = time.monotonic()
    machine = NamePattern(pattern)
    assert not machine.fullmatch("a" * 200)
    assert machine.find("a" * 200) is None
    assert not pattern_matches_ending(pattern, "model.layers.0.self_attn.q_proj" * 5)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("(", "not a regular expression"),
        ("q{99999999999}", "not a regular expression"),
        ("a" * 1001, "1001 characters"),
        ("((((((a{9}){9}){9}){9}){9}){9}){9}", "repeats too much"),
        (r"(a)\1", "refers back"),
        (r"(a)(?(1)b|c)", "refers back"),
        ("(?m)^a", "flag other than"),
        ("(?=(a))a", "group inside"),
    ],
)
def test_refused(pattern, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        NamePattern(pattern)


@pytest.mark.parametrize("pattern", ["a)(b", "(?i)v"])
def test_what_cannot_stand_in_a_larger_pattern_is_no_ending(pattern):
    with pytest.raises(ValueError, match="not a regular expression"):
        pattern_matches_ending(pattern, "v")


def test_long_names_are_refused():
    with pytest.raises(ValueError, match="1001 characters"):
        name_pattern(".*").fullmatch("a" * 1001)

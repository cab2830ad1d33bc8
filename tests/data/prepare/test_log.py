import pytest

from ssd_torchrec.data.prepare.log import Columns, Condition, LogConfig
from ssd_torchrec.errors import ConfigError


def test_columns_have_the_usual_names_of_their_format_unless_told():
    assert LogConfig().names("csv") == Columns("user_id", "item_id", "timestamp")
    assert LogConfig().names("jsonl") == Columns("reviewerID", "asin", "unixReviewTime")
    assert LogConfig(item="parent_asin").names("jsonl") == Columns("reviewerID", "parent_asin", "unixReviewTime")


TAKEN_APART = {
    "rating>=4": ("rating", ">=", "4"),
    "is click != 1": ("is click", "!=", "1"),
    " tab = long view ": ("tab", "=", "long view"),
    "t<-1.5e3": ("t", "<", "-1.5e3"),
    "a=": ("a", "=", ""),
}


@pytest.mark.parametrize(("text", "parts"), TAKEN_APART.items())
def test_conditions_are_taken_apart(text, parts):
    assert LogConfig(keep=(text,)).conditions == (Condition(*parts),)


REFUSED = {
    "no operator": ({"keep": ("rating",)}, "keep must be a column, one of .*, and a value, got 'rating'; write"),
    "text in order": ({"keep": ("rating>high",)}, "keep must compare by > with a number, got 'rating>high'"),
    "delimiter": ({"delimiter": ":::::"}, "delimiter must be at most 4 bytes without a line break, got ':::::'"),
    "columns": ({"columns": ("a", "b", "a")}, r"columns must differ from each other, got \['a', 'b', 'a'\]"),
    "of users": ({"columns_of_users": ("a", "a")}, "columns_of_users must differ from each other"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        LogConfig(**options)

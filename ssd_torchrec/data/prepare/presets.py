"""Official layouts of public logs. A log may be given as the file named here or as the folder it was unpacked into.

Where they are documented:

    # ml-1m, ml-20m     README of the archives, grouplens.org/datasets/movielens
    # amazon-*          jmcauley.ucsd.edu/data/amazon/index_2014.html, "Sample review" and "ratings only"
    # kuairand-*        github.com/chongminggao/KuaiRand, README, "Descriptions of the fields in log_xxx.csv"
    # lfm-1b            Schedl 2016, "The LFM-1b Dataset for Music Retrieval and Recommendation", table of its files
    # yelp              yelp.com/dataset/documentation, review.json
"""

from dataclasses import dataclass

from ssd_torchrec.data.prepare.log import LogConfig


@dataclass(frozen=True)
class LogPreset:
    """A public log."""

    about: str  # a line: which file to give
    log: LogConfig


def _movielens_20m() -> LogPreset:
    log = LogConfig(format="csv", files="ratings.csv", user="userId", item="movieId")
    return LogPreset("MovieLens 20M, 25M, 32M: ratings.csv", log)


def _amazon_reviews(name: str) -> LogPreset:
    log = LogConfig(format="jsonl", files=f"reviews_{name}_5.json*")
    return LogPreset(f"Amazon 2014, 5-core reviews: reviews_{name}_5.json.gz", log)


def _amazon_ratings() -> LogPreset:
    log = LogConfig(format="csv", files="ratings_*.csv", columns=("user_id", "item_id", "rating", "timestamp"))
    return LogPreset("Amazon 2014, ratings only: ratings_Beauty.csv and the like", log)


def _kuairand(name: str) -> LogPreset:
    log = LogConfig(format="csv", files="log_standard_*.csv", item="video_id", timestamp="time_ms", time_unit="ms")
    first = f"log_standard_4_08_to_4_21_{name.lower()}*.csv"
    return LogPreset(f"KuaiRand-{name}: the folder of {first} and the next; --keep is_click=1 for clicks alone", log)


def _lfm_1b() -> LogPreset:
    columns = ("user_id", "artist_id", "album_id", "track_id", "timestamp")
    log = LogConfig(format="tsv", files="LFM-1b_LEs.txt", columns=columns, item="track_id")
    return LogPreset("LFM-1b, tracks (--item artist_id or album_id for others): LFM-1b_LEs.txt", log)


def _yelp() -> LogPreset:
    log = LogConfig(
        format="jsonl",
        files="yelp_academic_dataset_review.json*",
        user="user_id",
        item="business_id",
        timestamp="date",
        time_unit="iso",
    )
    return LogPreset("Yelp Open Dataset: yelp_academic_dataset_review.json", log)


PRESETS: dict[str, LogPreset] = {
    "ml-1m": LogPreset("MovieLens 1M: ratings.dat", LogConfig(format="dat", files="ratings.dat")),
    "ml-20m": _movielens_20m(),
    "amazon-beauty": _amazon_reviews("Beauty"),
    "amazon-games": _amazon_reviews("Video_Games"),
    "amazon-sports": _amazon_reviews("Sports_and_Outdoors"),
    "amazon-toys": _amazon_reviews("Toys_and_Games"),
    "amazon-books": _amazon_reviews("Books"),
    "amazon-ratings": _amazon_ratings(),
    "kuairand-pure": _kuairand("Pure"),
    "kuairand-27k": _kuairand("27K"),
    "lfm-1b": _lfm_1b(),
    "yelp": _yelp(),
}
"""Public logs by name."""

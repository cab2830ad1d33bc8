"""Each preset reads some lines as its log's documentation shows them."""

from dataclasses import replace

import duckdb
import pytest

from ssd_torchrec.data.prepare.presets import PRESETS
from ssd_torchrec.data.prepare.stage import stage
from tests.data.prepare.logs import events, write

REVIEW = (
    '{"reviewerID": "A2SUAM1J3GNN3B", "asin": "0000013714", "reviewerName": "J. McDonald", "helpful": [2, 3], '
    '"reviewText": "I \\"enjoy\\" vast.", "overall": 5.0, "summary": "Heavenly", "unixReviewTime": 1252800000, '
    '"reviewTime": "09 13, 2009"}\n'
)
REVIEWED = [("A2SUAM1J3GNN3B", "0000013714", 1252800000)]
KUAIRAND = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,"
    "play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab\n"
)
SHOWN = "{},{},20220408,1400,{},1,0,0,0,0,0,0,5822,19960,0,0,0,0,1\n"
YELP = (
    '{"review_id":"zdSx_SD6obEhz9VrW9uAWA","user_id":"Ha3iJu77CxlrFm-vQRs_8g","business_id":"tnhfDv5Il8EaGSXZGiuQGg",'
    '"stars":4,"useful":0,"funny":0,"cool":0,"text":"Great, \\n place","date":"%s"}\n'
)

LOGS = {
    "ml-1m": ({"ratings.dat": "1::1193::5::978300760\n", "users.dat": "1::F::1::10::48067\n"}, [(1, 1193, 978300760)]),
    "ml-20m": (
        {
            "ratings.csv": "userId,movieId,rating,timestamp\n1,2,3.5,1112486027\n",
            "tags.csv": "userId,tag\n",
            "README.txt": "",
        },
        [(1, 2, 1112486027)],
    ),
    "amazon-beauty": ({"reviews_Beauty_5.json.gz": REVIEW}, REVIEWED),
    "amazon-games": ({"reviews_Video_Games_5.json": REVIEW}, REVIEWED),
    "amazon-sports": ({"reviews_Sports_and_Outdoors_5.json.gz": REVIEW}, REVIEWED),
    "amazon-toys": ({"reviews_Toys_and_Games_5.json.gz": REVIEW}, REVIEWED),
    "amazon-books": ({"reviews_Books_5.json.gz": REVIEW}, REVIEWED),
    "amazon-ratings": (
        {"ratings_Beauty.csv": "A39HTATAQ9V7YF,0205616461,5.0,1369699200\n"},
        [("A39HTATAQ9V7YF", "0205616461", 1369699200)],
    ),
    "kuairand-pure": (
        {
            "data/log_standard_4_22_to_5_08_pure.csv": KUAIRAND + SHOWN.format(1, 8, 1650600000999),
            "data/log_standard_4_08_to_4_21_pure.csv": KUAIRAND + SHOWN.format(0, 7, 1649398826000),
            "data/log_random_4_22_to_5_08_pure.csv": KUAIRAND + SHOWN.format(2, 9, 1650600000999),
            "data/user_features_pure.csv": "user_id,user_active_degree\n0,full_active\n",
        },
        [(0, 7, 1649398826), (1, 8, 1650600000)],
    ),
    "kuairand-27k": (
        {
            f"data/log_standard_{days}_27k_part{part}.csv": KUAIRAND + SHOWN.format(user, 7, 1649398826000)
            for user, (days, part) in enumerate(
                [("4_08_to_4_21", 1), ("4_08_to_4_21", 2), ("4_22_to_5_08", 1), ("4_22_to_5_08", 2)]
            )
        },
        [(user, 7, 1649398826) for user in range(4)],
    ),
    "lfm-1b": (
        {"LFM-1b_LEs.txt": "31435741\t2\t4\t6\t1385212958\n", "LFM-1b_users.txt": "user_id\tcountry\n31435741\tDE\n"},
        [(31435741, 6, 1385212958)],
    ),
    "yelp": (
        {
            "yelp_academic_dataset_review.json": YELP % "2016-03-09 12:00:01" + YELP % "2016-03-09",
            "yelp_academic_dataset_user.json": "{}\n",
        },
        [("Ha3iJu77CxlrFm-vQRs_8g", "tnhfDv5Il8EaGSXZGiuQGg", time) for time in (1457524801, 1457481600)],
    ),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_read_the_folder_and_the_file_of_their_log(tmp_path, name):
    files, expected = LOGS[name]
    for file, content in files.items():
        write(tmp_path / file, content)
    config = vars(PRESETS[name].log)
    assert events(tmp_path, **config) == expected
    first = next(iter(files))
    assert set(events(tmp_path / first, **config)) <= set(expected)
    assert PRESETS[name].about


def test_presets_take_further_options(tmp_path):
    for file, content in LOGS["ml-1m"][0].items():
        write(tmp_path / file, content)
    config = replace(PRESETS["ml-1m"].log, users=str(tmp_path / "users.dat"), user_columns=("gender", "occupation"))
    connection = duckdb.connect()
    stage(connection, tmp_path, config)
    assert connection.execute("FROM users").fetchall() == [(1, "F", "10")]

"""`ktransformers simulate`: the same seed prints the same; each tenant is in the picture of each policy."""

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from ktransformers.server.commands import simulate
from ktransformers.server.commands.curves import Panel, svg

TENANTS = ["a:kind=closed,count=4", "b<&>:rate=2,prompt=50,output=10,weight=2"]


def run(plot: Path, capsys, policies: str = "fifo,fair") -> str:
    chosen = simulate.options(TENANTS, None, 5.0, 1, policies.split(","), 256, 8, 1.0)
    assert simulate.run(chosen, plot) == 0
    return str(capsys.readouterr().out)


def test_the_same_seed_prints_the_same_and_draws_all(tmp_path: Path, capsys) -> None:
    first, second = (run(tmp_path / name, capsys) for name in ("1.svg", "2.svg"))
    traces = [[word for word in out.split() if len(word) == 12] for out in (first, second)]
    assert traces[0] == traces[1] and len(traces[0]) >= 2
    assert (tmp_path / "1.svg").read_bytes() == (tmp_path / "2.svg").read_bytes()
    picture = ET.parse(tmp_path / "1.svg").getroot()
    lines = picture.findall(".//{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == 2 * 2 and all(len(line.get("points", "").split()) > 10 for line in lines)
    words = {text.text for text in picture.iter("{http://www.w3.org/2000/svg}text")}
    assert {"fifo", "fair", "a (weight 1)", "b<&> (weight 2)"} <= words


@pytest.mark.parametrize(
    ("tenants", "seconds", "says"),
    [
        (["a:rate=1e9"], 300.0, "300,000,000,000 requests"),
        (["a:rate=1"], 1e12, "lower a rate, a count or --seconds"),
        (["a:kind=flood,count=999999999"], 5.0, "999,999,999 requests"),
        (["a*100:rate=10,kind=burst,count=5"], 5000.0, "5,000,000 requests"),
        (["a*1000000"], 1.0, "10,000 copies"),
        (["a*9000", "b*9000"], 1.0, "18,000 tenants"),
    ],
)
def test_what_would_take_for_ever_is_refused_at_once(tenants: list[str], seconds: float, says: str) -> None:
    chosen = simulate.options(tenants, None, seconds, 1, ["fair"], 256, 8, 1.0)
    with pytest.raises(ValueError, match=says):
        simulate.run(chosen)


def test_nothing_to_draw_is_drawn() -> None:
    ET.fromstring(svg([Panel("empty", [])], "x", "y"))
    ET.fromstring(svg([Panel("still", [("a", [(0.0, 0.0), (1.0, 0.0)])])], "x", "y"))

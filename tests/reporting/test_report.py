"""The HTML report of runs: its content, and that a browser shows it without loading anything else."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml

from allinone_ds import cli
from allinone_ds.errors import ConfigError
from allinone_ds.reporting.pictures import save_pictures
from allinone_ds.reporting.report import _limits, write_predictions_page, write_report
from allinone_ds.reporting.run_history import read_run
from tests.tiny_run import tiny_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SHARES = {"det": 0.02, "seg": 0.69, "cls": 0.29}
TASKS = tuple(SHARES)


def finished_run(folder: Path, **trainer: object) -> Path:
    """A run's folder as training leaves it, with values that a test can look for."""
    content = tiny_run(folder)
    content["trainer"].update(trainer)
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    events: list[dict] = [{"event": "begin", "time": 1.0, "step": 0, "max_steps": 4}]
    for step in (1, 2, 3, 4, 5, 6, 2, 3, 4):  # broken off after step 6, resumed after step 1
        if step == 2 and len(events) > 5:
            events.append({"event": "stopped", "time": 1.0, "step": 6, "signal": "SIGTERM"})
            events.append({"event": "warning", "time": 1.0, "step": 1, "message": "checkpoint-6 is broken"})
            events.append({"event": "begin", "time": 1.0, "step": 1, "max_steps": 4})
        entry = {"event": "log", "time": 1.0, "step": step, "loss": 3.0 / step, "seconds/step": 0.5}
        for task in TASKS:
            entry |= {
                f"loss/{task}": 1.0 / step,
                f"grad_norm/{task}/raw": 10.0 * step,
                f"grad_norm/{task}/share": SHARES[task],
            }
            entry |= {f"grad_norm/{task}/scale": 0.01 / step, f"grad_norm/{task}/scaled": 0.1}
            entry |= {f"images_per_second/{task}": 12.5, f"epoch/{task}": 0.5, f"skipped/{task}": 0}
        entry |= {"cosine/det/seg": -0.5, "memory/peak_gib": 1.0 + step, "broken_images": 7}
        events.append(entry)
        if step % 2 == 0:
            events.append({"event": "log", "time": 1.0, "step": step, "eval_det_map50": 0.1 * step, "eval_score": 0.3})
    lines = [json.dumps(event) for event in events]
    (folder / "log.jsonl").write_text("\n".join([*lines, '{"event": "lo']))
    metrics = {"steps": 4, "world_size": 2, "eval_det_map50": 0.4, "eval_det_samples": 9, "eval_score": 0.3}
    metrics |= {"eval_ema_det_map50": 0.45}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    wide = torch.full((3, 300, 640), 90, dtype=torch.uint8)
    pictures = {"det": [wide] * 2, "seg": [wide] * 2, "cls": [wide[:, :, :320]] * 3}
    save_pictures(pictures, folder)
    write_predictions_page(folder)
    return folder


class Seen(HTMLParser):
    """Every picture, link and word of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.pictures: list[dict] = []
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        found = dict(attrs)
        if tag == "img":
            self.pictures.append(found)
        self.addresses += [value for key, value in attrs if key in ("src", "href", "srcset", "data", "action")]


def test_a_page_of_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished_run(tmp_path / "run")
    assert [entry["step"] for entry in read_run(run).history if "loss" in entry] == [1, 2, 3, 4]
    assert cli.main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    text = (run / "report.html").read_text()
    seen = Seen(text)
    assert all(address.startswith("data:") for address in seen.addresses)
    assert "default-src 'none'" in text and not re.search(r"url\(|@import|<script", text)
    words = [picture["alt"] for picture in seen.pictures]
    assert "loss: det from 1 (step 1) to 0.25 (step 4), between 0.25 and 1; seg from" in " ".join(words)
    assert sum("test image" in word for word in words) == 7
    assert len(words) == len([word for word in words if len(word) > 20])
    assert "det: map50" in text and "0.4000" in text and "12.5" in text and "learning_rate: 0.001" in text
    shares = next(word for word in words if word.startswith("share of the squared norm of the update"))
    for task, share in SHARES.items():  # each line is that of its task
        assert f"{task} from {share:.3g} (step 1) to {share:.3g} (step 4)" in shares
    assert any(word.startswith("cosine of two tasks' backbone gradients: det and seg from -0.5") for word in words)
    rows = [re.sub("<.*?>", "|", row) for row in text.split("<tr>")]
    for parts in (
        ("det: map50, averaged weights", "0.4500"),
        ("peak memory", "|5.00|"),
        ("could not be read", "|7|"),
        ("|6|", "saved and stopped by SIGTERM"),
        ("|1|", "checkpoint-6 is broken"),
        ("|1|", "started again"),
    ):
        assert any(all(part in row for part in parts) for row in rows), parts


def test_several_runs_stand_side_by_side(tmp_path: Path) -> None:
    runs = [finished_run(tmp_path / "a"), finished_run(tmp_path / "b", learning_rate=7e-4)]
    text = write_report(runs, tmp_path / "both.html").read_text()
    assert "<code>trainer.learning_rate</code></td><td><code>0.001</code></td><td><code>0.0007</code>" in text
    assert "<code>name</code>" not in text and "<code>trainer.max_steps</code>" not in text
    words = " ".join(picture["alt"] for picture in Seen(text).pictures)
    assert "loss: det: a from 1 (step 1)" in words and "; b from" in words
    assert "test image 1 by a" in words and "test image 2 by b" in words
    assert text.count('<th scope="col" class="number">a</th>') == 1


def run_of(folder: Path, tasks: int) -> Path:
    """A run in progress, whose later pairs of tasks have lower cosines."""
    folder.mkdir()
    names = [f"t{number:02}" for number in range(tasks)]
    pairs = [f"cosine/{one}/{other}" for place, one in enumerate(names) for other in names[place + 1 :]]
    events = []
    for step in (1, 2):
        values = {f"{key}{n}{end}": 1.0 for n in names for key, end in (("loss/", ""), ("grad_norm/", "/raw"))}
        cosines = {pair: 1 - place / len(pairs) for place, pair in enumerate(pairs)}
        events.append({"event": "log", "step": step, "loss": 1.0, **values, **cosines, "seconds/step": 1.0})
        events.append({"event": "log", "step": step, "eval_score": 0.5, **{f"eval_{n}_map50": 0.5 for n in names}})
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, events)))
    (folder / "config.yaml").write_text(yaml.safe_dump({"tasks": {name: {} for name in names}}))
    return folder


def test_pages_of_many_tasks_stay_readable(tmp_path: Path) -> None:
    runs = [run_of(tmp_path / name, 14) for name in ("a", "b")]
    [cosines] = [p["alt"] for p in Seen(write_report(runs[:1]).read_text()).pictures if p["alt"].startswith("cosine")]
    assert "the 12 of 91 pairs with the lowest means: t12 and t13" in cosines and cosines.count(" and t") == 12
    text = write_report(runs, tmp_path / "both.html").read_text()
    titles = [picture["alt"].partition(": ")[0] for picture in Seen(text).pictures]
    assert {title: titles.count(title) for title in titles} == {"loss": 14, "evaluation": 15, "seconds per step": 1}
    assert "Of more than 12 tasks" in text


def test_a_running_run_has_a_page_and_an_unrelated_folder_has_none(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    for name in ("metrics.json", "predictions.html"):
        (run / name).unlink()
    shutil.rmtree(run / "predictions")
    assert "4, not ended" in write_report([run]).read_text()
    with pytest.raises(ConfigError, match="log.jsonl"):
        write_report([tmp_path])


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_a_browser_shows_it_at_every_width_without_requests(tmp_path: Path) -> None:
    runs = [finished_run(tmp_path / "a"), finished_run(tmp_path / "b", learning_rate=7e-4)]
    text = write_report(runs, tmp_path / "both.html").read_text()
    text = re.sub("<meta http-equiv=.*?>", "", text)  # what the page would ask for if nothing forbade it
    curious = text.replace("</body>", '<img src="https://example.invalid/x.png"></body>')  # so that the check can fail
    # frames in one page, measured from outside: a window has a least width, a frame has none
    pages = {"phone": (360, text), "desk": (1280, text), "curious": (800, curious)}
    frames = "".join(
        f'<iframe id="{name}" width="{width}" height="700"></iframe>' for name, (width, _) in pages.items()
    )
    texts = json.dumps({name: page for name, (_, page) in pages.items()}).replace("</", r"<\/")
    script = f"""
    const texts = {texts};
    for (const frame of document.querySelectorAll("iframe")) {{
      frame.onload = () => {{
        const page = frame.contentDocument, root = page.documentElement, pictures = [...page.images];
        document.title += JSON.stringify({{
          id: frame.id, scroll: root.scrollWidth, client: root.clientWidth,
          widest: Math.max(...pictures.map(p => p.getBoundingClientRect().right)),
          shown: pictures.filter(p => p.complete && p.naturalWidth > 0).length, all: pictures.length,
          text: parseFloat(getComputedStyle(page.body).fontSize),
          asked: frame.contentWindow.performance.getEntriesByType("resource").map(entry => entry.name)
        }}) + "|";
      }};
      frame.srcdoc = texts[frame.id];
    }}
    """
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(f"<!doctype html><title></title>{frames}<script>{script}</script>")
    quiet = ("--disable-background-networking", "--no-first-run", "--host-resolver-rules=MAP * ~NOTFOUND")
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [*command, *quiet, "--virtual-time-budget=10000", "--dump-dom", wrapper.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title, done.stderr[-2000:]
    found = {entry["id"]: entry for entry in (json.loads(part) for part in title[1].split("|") if part)}
    assert set(found) == set(pages)
    assert found.pop("curious")["asked"] == ["https://example.invalid/x.png"]
    for entry in found.values():
        assert entry["asked"] == []
        assert entry["scroll"] <= entry["client"], f"the page is wider than its window: {entry}"
        assert entry["widest"] <= entry["client"] and entry["shown"] == entry["all"] > 20 and entry["text"] >= 15


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0.01, 0.09], (0, 0.1)), ([0.0, 0.3], (0, 0.5)), ([0.6, math.nan], (0, 1)), ([0.1, 1.1], None)],
)
def test_small_values_are_no_flat_line(values: list[float], expected: tuple | None) -> None:
    assert _limits({"a": ([1, 2], values)}, (0, 1)) == expected

"""A real Prometheus reads a real run on Ray, and answers what the dashboard asks; Ray tells the run's status."""

import json
import math
import re
import shutil
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from pathlib import Path
from unittest.mock import ANY

import pytest
import yaml

from tests.train.cluster.test_launcher import make_job
from tests.train.cluster.test_monitoring import DASHBOARD, MONITORING, QUERIES
from train.cluster import launcher
from train.cluster.launcher import run_job
from train.records.runs import Run
from train.trainer.prometheus import PREFIX, descriptions, meaning, readings

pytestmark = [pytest.mark.faults, pytest.mark.timeout(180)]

SECONDS = 60  # for whatever must come


def until(found, what):
    """What `found` returns, once it is something."""
    deadline = time.monotonic() + SECONDS
    while not (answer := found()):
        assert time.monotonic() < deadline, f"{what}: nothing for {SECONDS} s"
        time.sleep(0.1)
    return answer


class Prometheus:
    """Debian's, with the project's config but for its interval and the file that it finds Ray by."""

    def __init__(self, folder: Path, discovery: Path):
        config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
        (source,) = config["scrape_configs"][0]["file_sd_configs"]
        assert source["files"] == [f"/tmp/ray/{discovery.name}"]
        source |= {"files": [str(discovery)], "refresh_interval": "1s"}
        config["global"] |= {"scrape_interval": "1s", "scrape_timeout": "1s"}
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        flags = [f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
        self._log = (folder / "log").open("w+")
        self.process = subprocess.Popen(
            ["prometheus", *flags, "--web.listen-address=127.0.0.1:0"], stdout=self._log, stderr=self._log
        )
        try:
            self.url = f"http://127.0.0.1:{until(self._port, 'the port of Prometheus')}"
            until(self._ready, "Prometheus")
        except BaseException:
            self.close()
            raise

    def ask(self, path, **given):
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(given)}", timeout=10) as answer:
            return json.load(answer)["data"]

    def query(self, expression):
        """Metrics' labels and values of an instant."""
        found = self.ask("query", query=expression)["result"]
        return [(each["metric"], float(each["value"][1])) for each in found]

    def _port(self):
        assert self.process.poll() is None, (Path(self._log.name)).read_text()
        found = [line for line in listening(self.process.pid) if line != "0"]
        return found[0] if found else None

    def _ready(self):
        try:
            return urllib.request.urlopen(f"{self.url}/-/ready", timeout=10).status == 200
        except OSError:
            return False

    def close(self):
        self.process.kill()
        self.process.wait()
        self._log.close()


def listening(pid):
    """Ports at 127.0.0.1 that a process listens on, as the kernel has them."""
    sockets = {str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()}
    rows = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    own = [row for row in rows if f"socket:[{row[9]}]" in sockets and row[3] == "0A"]
    assert all(row[1].startswith("0100007F:") for row in own), "not on localhost alone"
    return [str(int(row[1].split(":")[1], 16)) for row in own]


@pytest.fixture(scope="module")
def prometheus(ray_here, tmp_path_factory):
    if not shutil.which("prometheus"):
        pytest.skip("no Prometheus here (apt-get install --no-install-recommends prometheus)")
    session = Path(ray_here._private.worker._global_node.get_session_dir_path())
    discovery = session / "prom_metrics_service_discovery.json"
    until(discovery.exists, discovery.name)
    running = Prometheus(tmp_path_factory.mktemp("prometheus"), discovery)
    yield running
    running.close()


def runs_of(client):
    """The Train runs that the dashboard knows, by name; none until the first one has begun."""
    answer = client._do_request("GET", "/api/train/v2/runs/v1")
    if "Train state data is not available" in answer.text:
        return {}
    assert answer.status_code == 200, answer.text
    return {run["name"]: run for run in answer.json()["train_runs"]}


@pytest.fixture(scope="module")
def watched(ray_here, prometheus, tmp_path_factory, small_set):
    """A run of one worker, and every status that Ray told of it meanwhile."""
    from ray.job_submission import JobSubmissionClient

    job = make_job(tmp_path_factory.mktemp("watched") / "a run of 5%", small_set, epochs=8, precision="fp32")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS")  # which would come before the address that is given
        client = JobSubmissionClient(f"http://{ray_here._private.worker._global_node.webui_url}")
    statuses, ended = [], threading.Event()

    def look():
        while not ended.wait(0.2):
            if run := runs_of(client).get("a run of 5%"):
                statuses.append(run["status"])

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    try:
        run_job(job, workers=1)
        until(lambda: statuses and statuses[-1] == "FINISHED", "the end of the run")
    finally:
        ended.set()
        looking.join()
    return job, statuses, runs_of(client)["a run of 5%"]


def test_ray_tells_the_run_s_name_and_status(watched):
    job, statuses, run = watched
    assert "RUNNING" in statuses and statuses[-1] == "FINISHED"
    assert run["controller_actor_id"] and run["job_id"]
    assert [path.name for path in (job.folder / "ray").iterdir()] == ["a run of 5%"]


def test_prometheus_has_what_metrics_jsonl_has(watched, prometheus):
    job, _, _ = watched
    row = Run(job.folder).metrics()[-1]
    # What a worker told last is scraped for 20 s after it has ended; what was scraped is asked for.
    every = '{__name__=~"ray_patchclr_.+", run="a run of 5%"}'

    def newest():
        found = prometheus.query(f"last_over_time({every}[10m])")
        steps = [value for labels, value in found if "job" in labels]
        return found if steps and job.steps in steps else None

    until(newest, "the run's last row")
    names = prometheus.ask("label/__name__/values", **{"match[]": every})
    wanted = readings(row, job.steps)
    assert {f"ray_{name}" for name in wanted} == set(names)
    assert {"loss", "top1", "images_per_s", "data_wait", "learning_rate", "progress"} <= {n.removeprefix(PREFIX) for n in wanted}
    for name, value in wanted.items():
        ((_, found),) = prometheus.query(f'last_over_time(ray_{name}{{run="a run of 5%"}}[10m])')
        assert found == pytest.approx(value, rel=1e-6), name
        assert meaning(name), name
        texts = prometheus.ask("metadata", metric=f"ray_{name}")[f"ray_{name}"]
        assert {(each["type"], each["help"]) for each in texts} == {("gauge", meaning(name))}


def test_a_figure_that_is_no_number_is_a_gap(ray_here, prometheus, tmp_path, small_set):
    """And not its last good value."""
    tell = launcher._gauges(make_job(tmp_path / "diverging", small_set))
    row = {"epoch": 0, "step": 1, "loss": 5.0}
    tell(row)
    loss, step = 'ray_patchclr_loss{run="diverging"}', 'ray_patchclr_step{run="diverging"}'
    until(lambda: prometheus.query(loss), "the loss")
    tell(row | {"step": 2, "loss": math.nan})
    until(lambda: [value for _, value in prometheus.query(step)] == [2], "the next row")
    assert prometheus.query(loss) == []


# The dashboard


@pytest.fixture(scope="module")
def told_all(ray_here, prometheus, tmp_path_factory, small_set):
    """A run that tells every figure there is."""
    job = make_job(tmp_path_factory.mktemp("drawn") / "every figure", small_set)
    launcher._gauges(job)(dict.fromkeys(set(descriptions()) - {"progress"}, 0.25) | {"epoch": 0, "step": 1})
    until(lambda: prometheus.query('ray_patchclr_step{run="every figure"}'), "the drawn run")


@pytest.mark.parametrize(("title", "query"), QUERIES)
def test_every_panel_s_query_is_answered(told_all, prometheus, title, query):
    assert "$run" in query
    assert prometheus.query(query.replace("$run", "every.*")) == [({"run": "every figure"}, ANY)], title
    assert prometheus.query(query.replace("$run", "nobody")) == []


def test_the_dashboard_s_runs_are_found(told_all, prometheus):
    variable = next(each for each in DASHBOARD["templating"]["list"] if each["name"] == "run")
    metric = re.fullmatch(r"label_values\((\w+), run\)", variable["query"]["query"])[1]
    assert "every figure" in prometheus.ask("label/run/values", **{"match[]": metric})


def test_promtool_takes_the_config():
    if not shutil.which("promtool"):
        pytest.skip("no promtool here (apt-get install --no-install-recommends prometheus)")
    config = MONITORING / "prometheus.yml"
    done = subprocess.run(["promtool", "check", "config", str(config)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr + done.stdout

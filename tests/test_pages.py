"""README.md, CONTRIBUTING.md and docs/: their Python runs as it stands there, on small networks and with small numbers;
what they name exists; figures that are quoted are those of the page that they are from."""

import functools
import re
import shlex
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from _flows import normal
from torch import distributed as dist
from torch import nn

import flowkernels as fk
from flowkernels.bench import suite
from flowkernels.cli.main import _parser
from flowkernels.ops.public import OPS

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]
EACH = pytest.mark.parametrize("page", PAGES)


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


# ---- code ----


class Policy(nn.Module):
    """Of a state of four features, with an observation."""

    def __init__(self, features=4):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(features + 4, 16), nn.SiLU(), nn.Linear(16, features))

    def forward(self, x, t, obs=None):
        obs = x.new_zeros(len(x), 3) if obs is None else obs
        return self.body(torch.cat([x, (t / 1000)[:, None], obs], 1))


class Labelled(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.embedding = nn.Linear(4, 4), nn.Embedding(10, 4)

    def forward(self, x, t, y):
        return self.body(x) + self.embedding(y) * t[:, None]


class Host:
    """A policy whose loop is its own, of four steps."""

    def denoise_step(self, x_t, timestep, obs):
        return torch.tanh(x_t) * timestep + obs.mean(1, keepdim=True)

    def sample_actions(self, obs):
        x = torch.randn(len(obs), 4)
        for i in range(4):
            x = x - self.denoise_step(x_t=x, timestep=1 - i / 4, obs=obs) / 4
        return x


def blocks(page: str) -> list[str]:
    """The indented blocks of a page that are Python of this library."""
    found = re.findall(r"(?:^    .+\n(?:\n(?=    ))?)+", text_of(page), re.MULTILINE)
    code = [re.sub(r"^    ", "", block, flags=re.MULTILINE) for block in found]
    return [block for block in code if re.search(r"\bfk\.\w+\(", block)]


SMALLER = {
    "run/": "",
    "iterations=5000": "iterations=2",
    "noise=(3, 32, 32)": "noise=(4,)",
    "size=50_000": "size=40",
    "held_out=256": "held_out=8",
    "ends(256": "ends(8",
    "each(49_744, 50_000": "each(32, 40",
    "grid=100": "grid=24",
    "100)": "12)",
    'effort="best")': 'effort="best", grid=24, evaluations=20_000)',
    "minutes=5": "grid=24, minutes=0.05",
}
# page: how many blocks it has, the features of a sample, what the last block leaves
CODE = {
    "README.md": (1, 4, "x1"),
    "docs/choosing.md": (2, 4, "x1"),
    "docs/get-started.md": (9, 4, "x1"),
    "docs/couplings.md": (4, 4, "x1"),
    "docs/fused-samplers.md": (1, 64, "actions"),
    "docs/triton.md": (1, 4, "x1"),
    "docs/bank.md": (1, 4, "x1"),
    "docs/evaluating.md": (5, 4, "x1"),
    "docs/trainers.md": (1, 4, "x1"),
    "docs/integrations/host-loops.md": (1, 4, "actions"),
    "docs/integrations/denoisers.md": (1, 4, "x1"),
    "docs/integrations/k-diffusion.md": (1, 4, "x"),
}


@pytest.mark.parametrize("page", CODE)
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    count, features, last = CODE[page]
    names = dict(net=Policy(features).eval(), noise=normal(16, features), policy=Policy(64).eval(), torch=torch, nn=nn)
    names |= dict(model=Host(), observations=[normal(16, 3)], observation=[normal(16, 3)])
    names |= dict(obs=normal(16, 3), zeros=torch.zeros(1, 3), next_obs=normal(16, 3, seed=1), fk=fk, np=np)
    images = normal(256, features, seed=2)
    student = Policy(features)
    names |= dict(dataset=images, data=images[:16], loader=images.split(64), student=student, teacher=Policy(features))
    names |= dict(optimizer=torch.optim.SGD(student.parameters(), lr=0.01))
    names |= dict(classes=lambda x, t, y: x * y[:, None] / 10)
    names |= dict(labels=[0, 1] * 8, batch_labels=[1, 0, 0, 1] * 4)
    names |= dict(cal={4: fk.Schedule([0, 0.2, 0.4, 0.7, 1])}, velocity=names["net"])
    torch.save({"model": names["net"].state_dict()}, "last.ckpt")
    found = blocks(page)
    assert len(found) == count
    for code in found:
        for large, small in SMALLER.items():
            code = code.replace(large, small)
        exec(compile(code, page, "exec"), names)
    assert names[last].shape == names["noise"].shape
    assert names[last].isfinite().all()


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_the_code_of_many_devices_runs_in_a_group_of_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    alone = dict(backend="gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    monkeypatch.setattr(dist, "init_process_group", functools.partial(dist.init_process_group, **alone))
    code = "\n".join(blocks("docs/many-devices.md"))
    smaller = {
        "(3, 32, 32)": "(4,)",
        "512": "16",
        "100": "24",
        '"best"': '"fit"',
        "50_000": "64",
        "256": "16",
        "5000": "2",
    }
    for large, small in smaller.items():
        assert large in code
        code = code.replace(large, small)
    names = dict(fk=fk, velocity=Policy().eval())
    try:
        exec(compile(code, "docs/many-devices.md", "exec"), names)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    assert names["x1"].shape == (16, 4)
    assert Path("model.boss.json").exists()
    assert Path("run/00000002/run.pt").exists()
    assert torch.load("student.pt", weights_only=True).keys() == names["velocity"].state_dict().keys()


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_the_code_of_straightening_runs():
    torch.manual_seed(0)
    nearest, with_labels = blocks("docs/straightening.md")[:2]
    net, noise, labels = Policy().eval().requires_grad_(False), normal(16, 4), torch.arange(16) % 10
    labelled = fk.VelocityField(Labelled().eval(), conditioning={"y": labels})
    for code, velocity in ((nearest, net), (with_labels, labelled)):
        names = dict(fk=fk, torch=torch, velocity=velocity, noise=noise, labels=labels)
        names["cal"] = fk.calibrate(velocity, noise, 100, [4], progress=False)
        for large, small in {"iterations=1500": "iterations=2", "8192": "40"}.items():
            assert large in code
            code = code.replace(large, small)
        exec(compile(code, "docs/straightening.md", "exec"), names)
        assert names["x1"].shape == noise.shape
        assert names["x1"].isfinite().all()


def test_the_code_of_what_a_training_takes_runs():
    """And the figures beside it are what it prints."""
    torch.manual_seed(0)
    cost, scheduled, on_paper = blocks("docs/straightening.md")[5:]
    names = dict(fk=fk, torch=torch, velocity=Policy().eval(), noise=normal(16, 4))
    names["cal"] = fk.calibrate(names["velocity"], names["noise"], 8, [4], progress=False)
    for code in (cost, scheduled):
        for large, small in {"iterations=1500": "iterations=12", "8192": "40"}.items():
            assert large in code
            code = code.replace(large, small)
        exec(compile(code, "docs/straightening.md", "exec"), names)
    assert names["result"].history["lr"][0] == pytest.approx(2e-4 * 0.01)
    exec(compile(on_paper, "docs/straightening.md", "exec"), names)
    plan, page = names["plan"], " ".join(text_of("docs/straightening.md").split())
    whole = fk.training_plan(
        12e9, shape=(16, 128, 128), tokens=4608, width=3072, layers=57, iterations=2000, batch=64, bank=10_000,
        accumulate=8,
    )  # fmt: skip
    counts, hours, gb = plan.counts, sum(plan.hours.values()), 1e9
    for told in (
        f"{counts.bank.evaluations:,} evaluations of the teacher and {counts.with_graph.evaluations:,} of the student",
        f"a bank of {plan.bank_nbytes / gb:.3g} GB",
        f"{plan.nbytes / gb:.3g} GB a GPU of which {plan.memory['activations'] / gb:.3g} are activations of 8 examples",
        f"{hours:.1f} hours, {plan.hours['bank']:.1f} of them the bank's",
        f"{whole.nbytes / gb:.3g} GB and {sum(whole.hours.values()):.1f} hours",
    ):
        assert told in page


class Writer:
    """In the place of tensorboard's SummaryWriter and of wandb's run, which the tests do without."""

    def __init__(self, folder=""):
        self.told = {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def add_scalar(self, name, value, step):
        self.told[name, step] = value

    def log(self, values, step):
        self.told |= {(name, step): value for name, value in values.items()}


class Pixels(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, t):
        return self.layer(x) - x + t[:, None, None, None]


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_the_code_of_watching_a_training_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    (tmp_path / "run").mkdir()
    run, of_tensorboard, of_wandb, of_checkpoints = Writer(), *blocks("docs/straightening.md")[2:5]
    names = dict(fk=fk, torch=torch, velocity=Pixels().eval(), noise=normal(16, 1, 6, 6), SummaryWriter=Writer)
    names |= dict(wandb=SimpleNamespace(init=lambda project: run, Image=str))
    names["cal"] = fk.calibrate(names["velocity"], names["noise"], 8, [4], progress=False)
    smaller = {"iterations=1500": "iterations=6", "8192": "40", "held_out=256": "held_out=8"}
    smaller |= {"evaluate_every=100": "evaluate_every=3"}
    for large, small in smaller.items():
        assert large in of_tensorboard
        of_tensorboard = of_tensorboard.replace(large, small)
    exec(compile(of_tensorboard, "docs/straightening.md", "exec"), names)
    told = names["writer"].told
    assert [told["endpoint_error", it] for it in (3, 6)] == names["result"].evaluations["endpoint_error"][1:]
    assert [told["loss", it + 1] for it in (0, 5)] == names["result"].history["loss"]
    exec(compile(of_checkpoints, "docs/straightening.md", "exec"), names)
    assert [row.name for row in names["found"].rows] == ["iteration 6"]
    exec(compile(of_wandb, "docs/straightening.md", "exec"), names)
    training = of_tensorboard.partition("result =")[2].replace("run/run.pt", "run/other.pt")
    exec(compile(f"result ={textwrap.dedent(training)}", "docs/straightening.md", "exec"), names)
    assert {key: value for key, value in run.told.items() if key[0] != "samples"} == told
    assert {path.name for path in Path("run").glob("*.png")} == {"samples-000003.png", "samples-000006.png"}


def test_every_page_with_code_is_run():
    """Diffusers' by test_solver_scheduler.py and pipelines/test_pipeline_velocity.py, with pipelines; LoRA's by
    pipelines/test_lora.py, with peft; those of other codebases by the examples of pipelines/test_host_*.py."""
    elsewhere = {f"docs/{name}.md" for name in ("many-devices", "straightening", "diffusers", "lora")}
    elsewhere |= {f"docs/integrations/{name}.md" for name in ("f5-tts", "lerobot", "ode-libraries")}
    assert {page for page in PAGES if blocks(page)} == {*CODE, *elsewhere}


# ---- what is named ----

FOLDERS = "flowkernels|csrc|scripts|tests|benchmarks|docs"


@EACH
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]*\w)[^)]*\)", text_of(page)):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), target


@EACH
def test_names_exist(page):
    """`fk.name` and `flowkernels.a.b`, ops and files of the tree."""
    text = text_of(page)
    for name in set(re.findall(r"\bfk\.([A-Za-z_]\w*(?:\.\w+)*)", text)):
        found = fk
        for part in name.split("."):
            assert hasattr(found, part), f"fk.{name}"
            found = getattr(found, part)
    for path in set(re.findall(rf"(?<![\w/.<-])(?:{FOLDERS})/[\w/.*<>-]*[\w>*]", text)):
        found = [path.replace("<op>", op) for op in OPS] if "<op>" in path else [path]
        assert all([*ROOT.glob(one), *ROOT.glob(f"{one}.*")] for one in found), path


def options_of(parser) -> dict[str, set[str]]:
    (subparsers,) = [a for a in parser._actions if hasattr(a, "choices") and isinstance(a.choices, dict)]
    return {name: set(sub._option_string_actions) for name, sub in subparsers.choices.items()}


@EACH
def test_commands_exist(page):
    """`flowkernels command --option`."""
    known = options_of(_parser())
    text = text_of(page).replace("\\\n", " ")
    for line in re.findall(r"(?:^    |`)(?:\w+=\S+ )?(flowkernels [a-z][^`\n#]*)", text, re.MULTILINE):
        command, *rest = shlex.split(line.partition("--  ")[0])[1:] or [""]
        assert command in known, line
        own = rest[: rest.index("--")] if "--" in rest else rest
        for option in [word.split("=")[0] for word in own if word.startswith("--")]:
            assert option in known[command], line


def test_every_op_has_its_row():
    rows = re.findall(r"^\| `(\w+)` \|", text_of("docs/backends.md"), re.MULTILINE)
    assert sorted(rows) == sorted(OPS)
    assert set(OPS) <= set(suite.entries())


# ---- figures, and the first page's size ----


def test_readme_fits_a_screen_or_two():
    lines = text_of("README.md").splitlines()
    assert len(lines) <= 100
    assert [line.split()[0] for line in lines if line.startswith("    ./scripts/")] == [
        "./scripts/demo",
        "./scripts/test",
    ]


def table(text: str, *columns: str) -> list[list[str]]:
    """The cells of the tables whose headings begin with these."""
    head = "".join(rf"\| {re.escape(c)} " for c in columns)
    found = re.findall(rf"^{head}\|.*\n\|[-| :]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    return [[cell.strip() for cell in row.strip("|").split("|")] for rows in found for row in rows.splitlines()]


def test_the_choice_is_made_from_measured_figures():
    """docs/choosing.md's rows are docs/quality.md's."""
    quoted = table(text_of("docs/choosing.md"), "model", "row")
    assert len(quoted) > 12
    for model, row, *figures in quoted:
        section = re.search(rf"^## {model}\n(.*?)(?=^## )", text_of("docs/quality.md"), re.MULTILINE | re.DOTALL)[1]
        heading = re.search(r"^\| row \| .* evaluations \|.*$", section, re.MULTILINE)[0]
        columns = [c.strip() for c in heading.strip("|").split("|")]
        measured = next(r for r in table(section, "row", "N = 1") if r[0] == row)
        said = [
            re.sub(r"\*\*|±.*", "", measured[columns.index(c)]).strip()
            for c in ("N = 2", "N = 4", "N = 8", "evaluations")
        ]
        assert figures == said, (model, row)


def test_the_reference_has_every_public_name():
    pages = "".join(p.read_text() for p in (ROOT / "docs/reference").glob("*.md"))
    named = set(re.findall(r"^::: flowkernels\.(\w+)$", pages, re.MULTILINE))
    assert "<!-- each op -->" in pages
    assert named == set(fk.__all__) - set(OPS) - {"__version__"}

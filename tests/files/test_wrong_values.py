"""Well-formed files with one wrong value: one message, or nothing that the value could change."""

import contextlib
import io
import itertools
import math
from functools import partial

import published
import pytest
import torch
from runs import call, finetuning, make_folder, pretraining

from lib.cli.start import load_script
from lib.files import checkpoint
from lib.propagation.embedding_graph import KINDS
from models import build_model

predict, propagate = load_script("scripts/predict.py"), load_script("scripts/propagate.py")
# the graph of 52 pictures falls apart, and small changes of a file make other labels
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
LABELS, EPOCHS, MAX_ITERS = 8, 2, 4
NETWORK = ("--image-size", 8, "--arch", "wrn-10-1", "-b", 16, "--precision", "fp32", "-j", 0)
WRONG = {
    "None": None,
    "true": True,
    "-1": -1,
    "2^62": 2**62,
    "1e300": 1e300,
    "NaN": math.nan,
    "infinity": math.inf,
    "text": "wrong",
    "bytes": b"wrong",
    "empty list": [],
    "list of None": [None],
    "empty dict": {},
    "integers": torch.arange(3),
    "NaN matrix": torch.full((2, 2), math.nan),
    "complex": torch.zeros(2, dtype=torch.complex64),
}
# Entries that nobody reads but people. Those of a cache are compared, and it is made anew where one differs.
RECORDED = {
    "": (
        *("meta.git_commit", "meta.versions"),
        "meta.options",  # those that matter to a run are compared with it
        *("acc", "best_acc"),  # published names of what `accuracies` holds
    ),
    "published phase 1": ("lemniscate.params", "lemniscate.nLem"),
    "features": ("meta.checkpoint", "meta.image_size"),
    "pseudo-labels": ("meta.propagation", "meta.confidence"),
    "graph": ("meta",),
    "spectrum": ("meta",),
}
# Readers of nothing but a network, and the entries that they do not read.
NETWORK_ONLY = ("measure phase 1", "extract", "start phase 3", "predict")
OF_TRAINING = ("step", "epoch", "optimizer", "sums", "accuracies", "criterion", "lemniscate")

# How many entries stand for all of a dict.
FEW = {
    "net": 3,
    "state": 2,
    "options": 1,
    "versions": 1,
}

GROUP, OF_GROUP = ("param_groups", 0), ("lr", "params")


def fields(state, path=()):
    """The keys that lead to each entry at any depth, and the entry; of some dicts the first few."""
    items = enumerate(state) if isinstance(state, list) else state.items()
    few = 1 if isinstance(state, list) else FEW.get(path[-1] if path else "", 99)
    items = [item for item in items if path[-2:] != GROUP or item[0] in OF_GROUP]
    for key, value in itertools.islice(items, few):
        yield (*path, key), value
        if isinstance(value, dict | list):
            yield from fields(value, (*path, key))


def replaced(state, path, wrong):
    """The entries with one of them replaced; what does not lead to it is shared."""
    if not path:
        return wrong
    copy = state.copy()
    copy[path[0]] = replaced(state[path[0]], path[1:], wrong)
    return copy


def is_harmless(reader, path, value, wrong):
    """Whether a wrong value may be accepted: it is merely recorded, or of the kind that belongs there."""
    name = ".".join(map(str, path))
    is_dict = isinstance(value, dict) and isinstance(wrong, dict)
    recorded = (*RECORDED[""], *RECORDED.get(reader, ()))
    if name.startswith(recorded):
        return True
    if isinstance(value, str | bool):
        return type(wrong) is type(value)  # another name, or the other answer
    if isinstance(value, list) and not value and isinstance(wrong, list):
        return wrong == value
    if isinstance(value, list) and wrong == []:
        return path[-1] == "classes"  # no names
    if is_dict:
        return name in ("meta", "meta.options", "description.arguments", "sums")  # less is recorded
    is_number = isinstance(wrong, int | float) and not isinstance(wrong, bool)
    if isinstance(value, float) and is_number and math.isfinite(wrong):
        return abs(wrong) < 1e6
    return name == "accuracies.last" and wrong is None  # never measured


def computed_once(function):
    known = []

    def answer(*words):
        known[:] = known or [function(*words)]
        return known[0]

    return answer


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One good file of each kind, and for each the call of a script that reads it."""
    root, patch = tmp_path_factory.mktemp("wrong-values"), pytest.MonkeyPatch()
    data = ("--dataset", "folder", "--data-dir", make_folder(root / "pictures"))
    metric, classifier = root / "m" / "ckpt.cifar.pth.tar", root / "c" / "exp" / "ckpt.pth.tar"
    features, pseudo = root / "m" / "ckpt.cifar.folder.features.pth.tar", root / "p" / "8.pth.tar"
    phase1 = (*data, *NETWORK, "--epochs", EPOCHS, "--nce-k", 4, "--low-dim", 8)
    phase1 = (*phase1, "--model-dir", root / "m", "--log-dir", root / "log")
    phase3 = (*data, *NETWORK, "--num-labeled", LABELS, "--max-iters", MAX_ITERS)
    phase3 = (*phase3, "--model-root", root / "c", "--log-root", root / "log")
    phase2 = ("--num-labeled", LABELS, "--save-path", root / "p", "--num-neighbors", 6)
    phase2 = (*phase2, "--num-eigenvectors", 8)
    for script in (pretraining, finetuning):  # all these runs have the same steps
        patch.setattr(script, "step_arithmetic", computed_once(script.step_arithmetic))
    call(pretraining, *phase1)
    call(propagate, *data, "--checkpoint", metric, *phase2)
    call(finetuning, *phase3, "--pseudo-file", pseudo)
    pictures = (
        "--images",
        root / "pictures" / "test" / "red",
        "--output",
        root / "table.csv",
        "-j",
        0,
    )
    graph, spectrum = (next((root / "p" / "work").glob(f"{kind}-*")) for kind in KINDS)
    released = root / "released.pth.tar"
    network = build_model("wrn-10-1", 8, normalize=True)
    published.cifar_checkpoint(released, network, torch.randn(52, 8))
    checkpoint.save(checkpoint.load(released) | {"epoch": EPOCHS - 1}, released)
    again = partial(call, propagate, "--features", features, *phase2)
    readers = {
        "resume phase 1": (metric, partial(call, pretraining, *phase1, "--resume")),
        "published phase 1": (released, partial(call, pretraining, *phase1, "--resume")),
        "measure phase 1": (metric, partial(call, pretraining, *phase1, "--test-only", "--resume")),
        "extract": (metric, partial(call, propagate, *data, *phase2, "--checkpoint")),
        "resume phase 3": (
            classifier,
            partial(call, finetuning, *phase3, "--pseudo-file", pseudo, "--resume"),
        ),
        "start phase 3": (
            classifier,
            partial(call, finetuning, *phase3, "--exp-name", "b", "--pretrained"),
        ),
        "predict": (classifier, partial(call, predict, *pictures, "--checkpoint")),
        "features": (features, partial(call, propagate, *phase2, "--features")),
        "pseudo-labels": (
            pseudo,
            partial(call, finetuning, *phase3, "--exp-name", "d", "--pseudo-file"),
        ),
        "graph": (graph, lambda _: again()),
        "spectrum": (spectrum, lambda _: again()),
    }
    yield root, readers
    patch.undo()


def outcome(read, file):
    """What reading a file ends with: its message, "" if it was accepted; other errors are the test's."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            read(file)
    except (ValueError, FloatingPointError) as error:
        return str(error)
    return ""


def cases(reader, good):
    if reader in NETWORK_ONLY:
        good = {key: value for key, value in good.items() if key not in OF_TRAINING}
    for path, value in fields(good):
        for kind, wrong in WRONG.items():
            yield path, value, kind, wrong


def check(files, reader, every):
    """Give a reader every so-many-th wrong file, and print how many it refused."""
    root, readers = files
    good_file, read = readers[reader]
    in_place = reader in KINDS  # the name of such a file is the digest of what it was made from
    file = good_file if in_place else root / "wrong.pth.tar"
    whole, good = good_file.read_bytes(), checkpoint.load(good_file)
    assert outcome(read, good_file) == ""
    asked, refused, accepted = 0, 0, []
    for path, value, kind, wrong in itertools.islice(cases(reader, good), 0, None, every):
        checkpoint.save(replaced(good, path, wrong), file, flush=False)
        where = f"{reader}: {'.'.join(map(str, path))} = {kind}"
        try:
            said = outcome(read, file)
        except Exception as error:
            raise AssertionError(where) from error
        asked, refused = asked + 1, refused + bool(said)
        if not said and not is_harmless(reader, path, value, wrong):
            accepted.append(where)
        assert "\n" not in said, where
        good_file.write_bytes(whole)
    assert not accepted, "\n".join(accepted)
    print(f"{reader}: {asked} files with one wrong value, {refused} refused, none otherwise")


READERS = (
    *("resume phase 1", "measure phase 1", "extract", "resume phase 3", "start phase 3", "predict"),
    *("published phase 1", "features", "pseudo-labels", *KINDS),
)


@pytest.mark.parametrize("reader", READERS)
def test_some_wrong_values_end_in_one_message(files, reader):
    check(files, reader, 37)


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_every_wrong_value_of_every_entry_ends_in_one_message(files, reader):
    # those of a network alone read the files of phases 1 and 3 again
    check(files, reader, 3 if reader in NETWORK_ONLY else 1)

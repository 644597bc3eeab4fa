"""The training step: what it asks of an objective, and when."""

import pytest
import torch
from runs import CPU
from torch import nn

from lib.loading.batches import Batch
from lib.objectives.objective import Objective
from lib.training.step import train_steps


class Recorded(Objective):
    """The mean output, and a count of the images it has seen, in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.calls: list[tuple] = []

    def draw(self, total, place):
        return (torch.arange(total) + 100 * place,)

    def forward(self, network, batch):
        self.calls.append(("forward", batch.drawn[0].tolist(), len(batch.views)))
        outputs = network(batch.images)
        return {"loss": outputs.mean(), "spread": outputs.std()}, len(batch.indexes)

    def after_step(self, kept):
        self.calls.append(("after", tuple(kept)))
        self.seen += sum(kept)


def batches(sizes):
    return [Batch((torch.ones(n, 1, 2, 2) * n,), torch.arange(n), 0, n) for n in sizes]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 3))


def test_an_objective_is_asked_for_each_batch_and_told_after_the_optimizer_of_all_of_a_step():
    objective, model = Recorded(), network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps = list(
        train_steps(
            model,
            objective,
            optimizer,
            batches([4, 4, 2]),
            lambda number: 0.1 * number,
            CPU,
            first_step=5,
            iter_size=2,
        )
    )
    assert objective.calls == [
        ("forward", [1000, 1001, 1002, 1003], 1),
        ("forward", [1100, 1101, 1102, 1103], 1),
        ("after", (4, 4)),
        ("forward", [1200, 1201], 1),
        ("after", (2,)),
    ]
    assert float(objective.seen) == 10
    assert [(s.number, s.batch_size) for s in steps] == [(5, 8), (6, 2)]
    assert [s.lr for s in steps] == pytest.approx([0.5, 0.6])


def test_random_numbers_of_the_objective_are_those_of_this_process_rows():
    objective, model = Recorded(), network()
    batch = Batch((torch.ones(3, 1, 2, 2),), torch.arange(3), 4, 9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    list(train_steps(model, objective, optimizer, [batch], lambda _: 0.1, CPU, first_step=2))
    assert objective.calls[0] == ("forward", [204, 205, 206], 1)


def test_every_named_value_is_the_mean_over_the_images_of_a_step():
    objective, model = Recorded(), network()
    items = batches([6, 2])
    with torch.no_grad():
        outputs = [model(batch.images) for batch in items]
    (step,) = train_steps(
        model,
        objective,
        torch.optim.SGD(model.parameters(), 0.1),
        items,
        lambda _: 0.1,
        CPU,
        iter_size=2,
    )
    for name, measure in (("loss", torch.mean), ("spread", torch.std)):
        parts = [float(measure(one)) * len(one) for one in outputs]
        assert float(step.means[name]) == pytest.approx(sum(parts) / 8, rel=1e-5)
    assert step.loss is step.means["loss"]


def test_the_memory_of_an_objective_goes_through_a_checkpoint():
    objective = Recorded()
    objective.seen += 7
    entries = objective.checkpoint_entries()
    other = Recorded()
    other.load_entries(entries)
    assert float(other.seen) == 7
    with pytest.raises(KeyError):
        other.load_entries({})

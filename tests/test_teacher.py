import pytest
import torch
from torch import nn

from glocal.teacher import Teacher, rising


def modules() -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), nn.Linear(2, 3)]


def test_it_begins_as_a_copy_and_is_never_trained() -> None:
    students = modules()
    teacher = Teacher(*students)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.requires_grad for student in students for parameter in student.parameters())
    for mine, theirs in zip(teacher.parameters(), (p for s in students for p in s.parameters()), strict=True):
        assert mine.equal(theirs)
        assert mine.data_ptr() != theirs.data_ptr()


def test_it_follows_by_the_momentum_and_takes_running_statistics_over() -> None:
    students = modules()
    teacher = Teacher(*students)
    before = [parameter.clone() for parameter in teacher.parameters()]
    with torch.no_grad():
        for student in students:
            for parameter in student.parameters():
                parameter.add_(torch.randn_like(parameter))
    students[0](torch.randn(4, 1, 5, 5))  # moves the statistics of batch norm
    teacher.follow(students, 0.9)
    now = [p for s in students for p in s.parameters()]
    for mine, was, theirs in zip(teacher.parameters(), before, now, strict=True):
        torch.testing.assert_close(mine, 0.9 * was + 0.1 * theirs.detach())
    for mine, theirs in zip(teacher.buffers(), (b for s in students for b in s.buffers()), strict=True):
        assert mine.equal(theirs)


@pytest.mark.parametrize("gathers", [False, True])
def test_what_it_is_shown_leaves_its_statistics_alone_unless_it_gathers_them(gathers: bool) -> None:
    students = modules()
    teacher = Teacher(*students, gathers=gathers)
    before = teacher[0][1].running_mean.clone()
    teacher[0].train()(torch.randn(4, 1, 5, 5) + 3)
    assert before.equal(teacher[0][1].running_mean) != gathers
    assert students[0][1].momentum == 0.1


def test_momentum_rises_to_one() -> None:
    values = [rising(0.996, step, 100) for step in range(101)]
    assert values[0] == pytest.approx(0.996)
    assert values[50] == pytest.approx(0.998)
    assert values[-1] == 1
    assert values == sorted(values)

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from method_checks import ALL, MethodChecks
from safetensors.torch import load_file
from torch import Tensor, nn

from glocal import engine
from glocal.checkpoints import training_state
from glocal.contrast.regions import local_masks
from glocal.data.plan import PreprocessOptions
from glocal.data.preprocess import preprocess
from glocal.data.sampling import Pool, Slices
from glocal.data.split import Split
from glocal.data.store import Store
from glocal.errors import GlocalError
from glocal.networks.heads import DenseHead, GlobalHead
from glocal.pretraining import base, gcl
from glocal.pretraining import pretrain as pretraining
from glocal.pretraining.base import COLLAPSED, Stage
from glocal.pretraining.gcl import Global, Joint, Local
from glocal.pretraining.pretrain import pretrain
from glocal.randomness import generator
from glocal.runs import manifest_of
from glocal.views.intensity import IntensityOptions
from glocal.views.view import ViewOptions

WIDTHS = {"hidden": 32, "outputs": 16, "batch": 6, "volumes": 3, "local_batch": 4, "blocks": 1}
OPTIONS: dict[str, dict[str, Any]] = {
    "G^R": {"strategy": "random", "local": "none"},
    "G^D-": {"strategy": "D-", "local": "none"},
    "G^D": {"strategy": "D", "local": "none"},
    "G^D- without originals": {"strategy": "D-", "local": "none", "originals": False},
    "G^D without originals": {"strategy": "D", "local": "none", "originals": False, "views": 2},
    "G^R + L^R": {"strategy": "random", "kernel": 1},
    "G^D- + L^R": {"strategy": "D-", "negatives": "all", "regions": 9},
    "G^D + L^R": {"strategy": "D", "frozen_batch_norm": "train"},
    "G^R + L^D": {"strategy": "random", "local": "D", "projection": False},
    "G^D- + L^D": {"strategy": "D-", "local": "D", "kernel": 1, "negatives": "all"},
    "G^D + L^D": {"strategy": "D", "local": "D", "blocks": 2},
    "G^D + L^R at once": {"stages": 1, "lambda2": 10},
    "G^R + L^D at once": {"stages": 1, "strategy": "random", "local": "D", "projection": False},
}


@pytest.mark.parametrize("options", [{**WIDTHS, **options} for options in OPTIONS.values()], ids=OPTIONS.keys())
class TestGCL(MethodChecks):
    method = "gcl"

    def also_changing(self, stage: Stage) -> set[str]:
        if not (isinstance(stage, Local) and stage.options.frozen_batch_norm == "train"):
            return set()
        statistics = ("running_mean", "running_var", "num_batches_tracked")
        return {name for name in stage.network.state_dict() if name.startswith("encoder") and name.endswith(statistics)}


def seen(stage: Any, head: str, step: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Slices, Tensor, Tensor, Tensor]:
    """One step of a stage: the slices that it drew, what entered the encoder, what left the head, the loss."""
    drawn: list[Slices] = []
    entered: list[Tensor] = []
    left: list[Tensor] = []
    for name in ("uniform", "partitioned"):
        draw = getattr(Pool, name)
        monkeypatch.setattr(Pool, name, lambda *words, draw=draw: drawn.append(draw(*words)) or drawn[-1])
    stage.network.encoder.register_forward_hook(lambda *call: entered.append(call[1][0]))
    getattr(stage, head).register_forward_hook(lambda *call: left.append(call[2].detach().double()))
    loss = stage.losses(step)["loss"]
    (slices,), (inputs,), (outputs,) = drawn, entered, left
    return slices, inputs, outputs, loss.detach().double()


def directed(similarity: Tensor, positive: int, negatives: list[int]) -> Tensor:
    """Eq. 1 of Chaitanya et al., of one anchor: `similarity` holds its cosines over the temperature."""
    return -(similarity[positive].exp() / (similarity[positive].exp() + similarity[negatives].exp().sum())).log()


@pytest.mark.parametrize("strategy", ["random", "D-", "D"])
@pytest.mark.parametrize("originals", [True, False])
def test_the_global_loss_is_the_paper_s(
    strategy: str, originals: bool, store: Store, cheap: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    views = 1 if strategy == "D" else 2
    options = {**cheap, **WIDTHS, "method": "gcl", "strategy": strategy, "originals": originals, "local": "none"}
    stage = TestGCL().stages(options, store)[0]
    slices, inputs, embeddings, loss = seen(stage, "g1", 1, monkeypatch)

    untouched = originals and strategy != "random"
    n = len(slices)
    assert n == (6 if strategy == "random" else 12)  # three volumes of four partitions
    assert len(inputs) == len(embeddings) == n * (views + untouched)
    images = store.images(slices.index)
    for version, batch in enumerate(inputs.split(n)):
        assert batch.equal(images) == (untouched and version == 0)

    similarity = nn.functional.normalize(embeddings, dim=1)
    similarity = similarity @ similarity.T / 0.1
    image = list(range(n)) * (views + untouched)
    volume, partition = slices.volume.tolist(), (slices.number * 4 // slices.count).tolist()
    terms = []
    for u in range(len(image)):
        for v in range(len(image)):
            if u == v:
                continue
            a, b = image[u], image[v]
            if strategy == "random":
                attracts = a == b
                negatives = [k for k in range(len(image)) if image[k] != a]
            else:
                both_original_or_both_view = (untouched and u < n) == (untouched and v < n)
                across = volume[a] != volume[b] and partition[a] == partition[b] and both_original_or_both_view
                attracts = a == b or (strategy == "D" and across)
                negatives = [k for k in range(len(image)) if partition[image[k]] != partition[a]]
            if attracts:
                terms.append(directed(similarity[u], v, negatives))
    torch.testing.assert_close(loss, torch.stack(terms).mean(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("local", ["random", "D"])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("negatives", ["neighbours", "all"])
def test_the_local_loss_is_the_paper_s(
    local: str, kernel: Any, negatives: Any, store: Store, cheap: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**cheap, **WIDTHS, "method": "gcl", "local": local, "kernel": kernel, "negatives": negatives}
    options |= {"volumes": 2, "local_batch": 9, "augmentation": {"spatial": {"rotation": 90}, "intensity": "none"}}
    stage: Any = TestGCL().stages(options, store)[1]
    slices, inputs, maps, loss = seen(stage, "g2", 1, monkeypatch)
    n = len(slices)
    # Only the values of a view may change: what is left of this augmentation is nothing.
    assert inputs.equal(store.images(slices.index).repeat(2, 1, 1, 1))

    side = maps.shape[-1] - (4 if kernel == 3 else 1)
    lattice = [(row * side // 4, column * side // 4) for row in (0, 2, 4) for column in (0, 2, 4)]
    quarter = [(row * side // 4, column * side // 4) for row in (1, 3) for column in (1, 3)]
    between = [(side // 4, side // 2), (side // 2, side // 4), (side // 2, 3 * side // 4), (3 * side // 4, side // 2)]
    corners = lattice + quarter + (between if (kernel, negatives) == (3, "neighbours") else [])
    windows = [
        [m[:, r : r + kernel, c : c + kernel].permute(1, 2, 0).flatten() for r, c in corners] for m in maps.unbind()
    ]
    vectors = torch.stack([torch.stack(window) for window in windows])  # maps, regions, values
    if kernel == 3:
        vectors = vectors @ stage.projection.weight.detach().double().T
        assert vectors.shape[-1] == 128
    vectors = nn.functional.normalize(vectors, dim=-1)

    repelling = local_masks(13, kernel, negatives)[1]
    volume, partition = slices.volume.tolist(), (slices.number * 4 // slices.count).tolist()
    alike = {(partition[a], volume[a]) for a in range(n)}
    assert len(alike) > len({part for part, _ in alike}), "L^R and L^D would be the same"
    terms = []
    for u in range(2 * n):
        for v in range(2 * n):
            a, b = u % n, v % n
            across = local == "D" and volume[a] != volume[b] and partition[a] == partition[b]
            if u == v or not (a == b or across):
                continue
            both = torch.cat([vectors[u], vectors[v]])
            for region in range(13):
                others = repelling[region].nonzero().flatten().tolist()
                terms.append(directed(vectors[u, region] @ both.T / 0.1, len(corners) + region, others))
    torch.testing.assert_close(loss, torch.stack(terms).mean(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_second_stage_builds_on_the_first(mode: str, store: Store, tmp_path: Path, cheap: dict[str, Any]) -> None:
    settings = {**cheap, **WIDTHS, "method": "gcl", "max_iterations": 2, "frozen_batch_norm": mode}
    weights = load_file(pretrain(store, tmp_path, settings, split=Split(0, ALL, (), ())))
    first = load_file(tmp_path / "stage-1-global" / "model.safetensors")
    assert {name.partition(".")[0] for name in first} == {"encoder"}
    assert {".".join(name.split(".")[:2]) for name in weights if name.startswith("decoder")} == {"decoder.0"}
    statistics = [name for name in first if "running" in name]
    assert statistics
    assert all(weights[name].equal(first[name]) == (mode == "eval") for name in statistics)
    assert all(weights[name].equal(value) for name, value in first.items() if name.endswith(("weight", "bias")))
    assert weights.keys() == load_file(tmp_path / "stage-2-local" / "model.safetensors").keys()


def joint(store: Store, cheap: dict[str, Any], **options: Any) -> Any:
    """The only stage of a training with both losses."""
    (stage,) = TestGCL().stages({**cheap, **WIDTHS, "method": "gcl", "stages": 1, **options}, store)
    return stage


def test_the_losses_of_one_stage_are_those_of_the_two(
    store: Store, cheap: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = joint(store, cheap, lambda2=7.0)
    assert isinstance(both, Joint)
    assert (both.trained, both.frozen) == (("encoder", "decoder.0"), ())
    # Of the same slices and views as in a stage of its own, and of a batch norm that sees them.
    for module in (gcl, base):
        monkeypatch.setattr(module, "generator", lambda *keys: generator(*(key for key in keys if key != "joint")))
    two = TestGCL().stages({**cheap, **WIDTHS, "method": "gcl", "frozen_batch_norm": "train"}, store)
    weights = both.state_dict()
    alone = []
    for stage in two:
        stage.load_state_dict({name: weights[name] for name in stage.state_dict()})
        alone.append(stage.losses(3)["loss"])
    found = both.losses(3)
    assert found.keys() == {"loss", "L_g", "L_l"}
    torch.testing.assert_close([found["L_g"], found["L_l"]], alone)
    torch.testing.assert_close(found["loss"], alone[0] + 7 * alone[1])
    assert not torch.isclose(*alone)


def test_the_two_losses_of_one_stage_see_slices_and_views_of_their_own(
    store: Store, cheap: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = joint(
        store,
        cheap,
        strategy="random",
        local_batch=6,
        augmentation=ViewOptions(intensity=IntensityOptions(brightness=0.5)),
    )
    drawn: list[Slices] = []
    entered: list[Tensor] = []
    uniform = Pool.uniform
    monkeypatch.setattr(Pool, "uniform", lambda *words: drawn.append(uniform(*words)) or drawn[-1])
    stage.network.encoder.register_forward_hook(lambda *call: entered.append(call[1][0]))
    stage.losses(0)
    assert len(drawn) == 2
    assert not drawn[0].index.equal(drawn[1].index)
    shown = torch.cat([store.images(slices.index).repeat(2, 1, 1, 1) for slices in drawn])
    brightness = (torch.cat(entered) - shown).mean((1, 2, 3))
    assert len(brightness) == 24  # either loss has two views of six slices
    assert torch.pdist(brightness[:, None]).min() > 1e-5


def test_in_one_stage_either_loss_trains_the_encoder(store: Store, cheap: dict[str, Any]) -> None:
    stage, gradients = joint(store, cheap), []
    for name in ("L_g", "L_l"):
        stage.zero_grad()
        stage.losses(0)[name].backward()
        gradients.append(stage.network.encoder[0][0].conv.weight.grad.clone())
        decoder = stage.network.decoder[0].join[0].conv.weight.grad
        assert (decoder is not None and bool(decoder.any())) == (name == "L_l")
    assert all(gradient.any() for gradient in gradients)
    assert not torch.allclose(*gradients)


@pytest.mark.parametrize("collapsed", ["GlobalHead", "DenseHead"])
def test_in_one_stage_either_head_may_collapse(
    collapsed: str, store: Store, cheap: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = joint(store, cheap)
    stage.losses(0)
    assert stage.warning() is None
    monkeypatch.setattr(gcl, collapsed, {"GlobalHead": Constant, "DenseHead": ConstantMaps}[collapsed])
    stage = joint(store, cheap)
    stage.losses(0)
    assert stage.warning() == COLLAPSED


class ConstantMaps(DenseHead):
    """A head that has collapsed: one vector for every place."""

    def forward(self, x: Tensor) -> Tensor:
        return 0 * super().forward(x) + 1


class Constant(GlobalHead):
    """A head that has collapsed: one vector for every image."""

    def forward(self, x: Tensor) -> Tensor:
        return 0 * super().forward(x) + 1


def test_what_the_first_stage_warned_of_is_kept_when_the_second_is_stopped(
    store: Store, tmp_path: Path, cheap: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(stage: Stage, step: int) -> dict[str, Tensor]:
        raise KeyboardInterrupt

    settings, split = {**cheap, **WIDTHS, "method": "gcl", "max_iterations": 1}, Split(0, ALL, (), ())
    monkeypatch.setattr(gcl, "GlobalHead", Constant)
    with monkeypatch.context() as patch:
        patch.setattr(Local, "losses", stop)
        with pytest.raises(KeyboardInterrupt):
            pretrain(store, tmp_path / "run", settings, split=split)
    pretrain(store, tmp_path / "run", settings, split=split)
    assert manifest_of(tmp_path / "run")["warnings"] == [COLLAPSED]
    with pytest.raises(GlocalError, match="begun with another split of the cases"):
        pretrain(store, tmp_path / "run", settings, split=Split(0, ALL[1:], (), ()))


@pytest.mark.parametrize(
    ("options", "cases", "sentence"),
    [
        ({"strategy": "random", "views": 1}, ALL, "nothing attracts it: set views=2"),
        ({"strategy": "D-", "views": 1, "originals": False}, ALL, "set views=2"),
        ({"strategy": "D", "originals": False}, ("case1",), "set views=2"),
        ({"strategy": "D", "originals": False, "volumes": 1}, ALL, "set views=2"),
        ({"strategy": "D", "partitions": 1}, ALL, "needs two partitions or more"),
        ({"strategy": "D-", "partitions": 1}, ALL, "needs two partitions or more"),
        ({"blocks": 3}, ALL, "has 2 decoder blocks, 3 were asked for"),
        ({"network": {"widths": [4, 8, 8, 8, 8]}}, ALL, "feature map of 4 x 4"),
        ({"views": 0}, ALL, "pretrain.views=0 does not fit"),
        ({"stages": 1, "partitions": 1}, ALL, "needs two partitions or more"),
        ({"stages": 1, "blocks": 3}, ALL, "has 2 decoder blocks, 3 were asked for"),
        ({"stages": 1, "local": "none"}, ALL, "stages=1 trains with both losses at once, and local=none leaves one"),
    ],
)
def test_what_cannot_be_learnt_is_refused_before_anything_is_written(
    options: dict[str, Any], cases: tuple[str, ...], sentence: str, store: Store, tmp_path: Path, cheap: dict[str, Any]
) -> None:
    settings = {**cheap, **WIDTHS, "method": "gcl", "max_iterations": 1, **options}
    with pytest.raises(GlocalError, match=sentence):
        pretrain(store, tmp_path / "run", settings, split=Split(0, cases, (), ()))
    assert not (tmp_path / "run").exists()


def test_one_slice_is_told_apart_from_nothing(odd: Store, tmp_path: Path, cheap: dict[str, Any]) -> None:
    settings = {**cheap, **WIDTHS, "method": "gcl", "strategy": "random", "local": "none", "max_iterations": 1}
    with pytest.raises(GlocalError, match="only one here: add volumes"):
        pretrain(odd, tmp_path / "run", settings, split=Split(0, ("odd1",), (), ()))


def test_the_second_stage_computes_as_the_first_has_begun(
    store: Store,
    tmp_path: Path,
    cheap: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    begun_long_ago: Callable[[Path], None],
) -> None:
    settings = {**cheap, **WIDTHS, "method": "gcl", "max_iterations": 2, "precision": "auto"}
    work, threads = pretraining.train, torch.get_num_threads()

    def stopped(stage: Any, *words: Any) -> list[str]:
        if isinstance(stage, Local):
            raise KeyboardInterrupt
        return work(stage, *words)

    try:
        torch.set_num_threads(2)
        monkeypatch.setattr(engine, "precision_of", lambda _, asked: "bfloat16" if asked == "auto" else asked)
        monkeypatch.setattr(pretraining, "train", stopped)
        with pytest.raises(KeyboardInterrupt):
            pretrain(store, tmp_path, settings)
        monkeypatch.setattr(pretraining, "train", work)
        begun_long_ago(tmp_path / "stage-1-global")
        torch.set_num_threads(1)  # another machine
        monkeypatch.setattr(engine, "precision_of", lambda _, asked: "float32" if asked == "auto" else asked)
        pretrain(store, tmp_path, settings)
    finally:
        torch.set_num_threads(threads)
    for stage in ("stage-1-global", "stage-2-local"):
        state = training_state(tmp_path / stage)
        assert (state["precision"], state["threads"]) == ("bfloat16", 2)
    assert 1000 <= manifest_of(tmp_path)["seconds"] < 1100  # those of the first start, too


def test_regions_lie_where_the_image_is(
    preprocessing: PreprocessOptions, raw: Path, cheap: Any, tmp_path: Path
) -> None:
    options = preprocessing.model_copy(update={"size": (36, 28)})  # padded to 40 x 32
    store = preprocess(raw, tmp_path / "store", options, workers=1)
    network = {"name": "unet", "widths": [4, 4, 4, 4]}
    stage: Any = TestGCL().stages({**cheap, **WIDTHS, "method": "gcl", "network": network, "blocks": 2}, store)[1]
    assert stage.network.multiple == 8
    assert (stage.positions.amax(0) + 3).tolist() == [17, 13]  # of 18 x 14; K = 3 leaves the last row and column out


def test_views_that_would_lose_half_of_the_values_are_refused(
    preprocessing: PreprocessOptions, raw: Path, cheap: Any, tmp_path: Path
) -> None:
    options = preprocessing.model_copy(update={"intensity": "zscore"})
    store = preprocess(raw, tmp_path / "store", options, workers=1)
    settings = {**cheap, **WIDTHS, "method": "gcl", "max_iterations": 1, "local": "none"}
    with pytest.raises(GlocalError, match=r"clip=\[0, 1.5\] would blacken .* set augmentation.intensity.clip=null"):
        pretrain(store, tmp_path / "run", settings)
    for clip in (None, (-3.0, 3.0)):
        free = ViewOptions(intensity=IntensityOptions(clip=clip)).model_dump()
        assert pretrain(store, tmp_path / str(clip), {**settings, "augmentation": free}).exists()


def test_single_slices_have_no_partitions(odd: Store, tmp_path: Path, cheap: dict[str, Any]) -> None:
    settings = {**cheap, **WIDTHS, "method": "gcl", "max_iterations": 1, "local": "none"}
    split = Split(0, ("odd1",), (), ())
    with pytest.raises(GlocalError, match="a volume of two slices or more"):
        pretrain(odd, tmp_path / "D", settings, split=split)
    split = Split(0, ("odd1", "odd2"), (), ())
    assert pretrain(odd, tmp_path / "random", {**settings, "strategy": "random"}, split=split).exists()


def test_without_originals_two_volumes_of_one_view_are_enough(store: Store, cheap: dict[str, Any]) -> None:
    options = {**cheap, **WIDTHS, "method": "gcl", "strategy": "D", "originals": False, "local": "none"}
    (stage,) = TestGCL().stages(options, store, ("case0", "case1"))
    assert isinstance(stage, Global)
    assert stage.losses(0)["loss"] > 0

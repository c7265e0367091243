"""attach and detach: what is recorded, what is refused, what is left behind."""

from __future__ import annotations

import copy
import pickle
import warnings
from contextlib import nullcontext

import pytest
import torch
from tests.core.models import Inside, Mlp, Pair, Stack
from torch import nn

import tensortap
from tensortap.testing import snapshot_of


def run(model, *args, backward=False, **options):
    """Run a model under a tap and return the sink."""
    sink = tensortap.MemorySink()
    with tensortap.attach(model, sink, on_error="raise", **options):
        output = model(*args)
        if backward:
            output.sum().backward()
    return sink


def only(sink, name):
    """The one record of a name and its payload."""
    [(record, payload)] = sink.find(name)
    return record, payload


def test_one_line_records_every_phase_of_every_module():
    sink = run(Mlp(), torch.randn(3, 8), backward=True)
    for module in ("root", "up", "act", "down"):
        for tensor in ("forward/input", "forward/output", "backward/grad_output"):
            assert f"{module}/{tensor}" in sink.names()
    for tensor in ("param/weight", "param/bias", "grad/weight", "grad/bias"):
        assert f"up/{tensor}" in sink.names()


def test_values_are_those_the_model_computed():
    model, x = Mlp(), torch.randn(3, 8, requires_grad=True)
    sink = run(model, x, backward=True, values="full")
    hidden = model.up(x)
    assert torch.equal(only(sink, "up/forward/output")[1], hidden)
    assert torch.equal(only(sink, "up/param/weight")[1], model.up.weight)
    assert torch.equal(only(sink, "up/grad/weight")[1], model.up.weight.grad)
    expected = torch.autograd.grad(model.down(model.act(hidden)).sum(), hidden)[0]
    assert torch.equal(only(sink, "up/backward/grad_output")[1], expected)
    assert torch.equal(only(sink, "root/backward/grad_input")[1], x.grad)


def test_grad_input_is_the_total_gradient_of_a_shared_input():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.q(x) * self.k(x)

    x = torch.randn(2, 4, requires_grad=True)
    sink = run(Shared(), x, backward=True, values="full")
    for site in ("root", "q", "k"):
        assert torch.equal(only(sink, f"{site}/backward/grad_input")[1], x.grad)


def test_an_inplace_result_and_the_value_before_it_have_their_own_gradients():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Inside(lambda x: x * 2), Inside(lambda x: x * 3)

        def forward(self, x):
            h = self.a(x)
            h.mul_(5)
            return self.b(h)

    x = torch.randn(4, requires_grad=True)
    sink = run(InPlace(), x, backward=True, values="full")
    assert only(sink, "a/backward/grad_output")[1].tolist() == [15.0] * 4
    assert only(sink, "b/backward/grad_input")[1].tolist() == [3.0] * 4


def test_inplace_op_after_the_hook_does_not_change_the_record():
    model = nn.Sequential(nn.Identity(), nn.ReLU(inplace=True))
    x = torch.tensor([-1.0, 2.0])
    sink = run(model, x.clone(), values="full")
    assert only(sink, "1/forward/input")[1].tolist() == [-1.0, 2.0]
    assert only(sink, "0/forward/output")[1].tolist() == [-1.0, 2.0]
    assert only(sink, "1/forward/output")[1].tolist() == [0.0, 2.0]
    assert only(sink, "1/forward/input")[0].stats.min == -1.0


def test_data_and_numpy_writes_between_two_modules_show_in_both_records():
    class Sneaky(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Identity(), nn.Identity(), nn.Identity()

        def forward(self, x):
            x = self.a(x)
            x.data.add_(1)
            x = self.b(x)
            x.numpy()[...] = 7
            return self.c(x)

    sink = run(Sneaky(), torch.zeros(3), values="full")
    seen = [only(sink, f"{site}/forward/input")[1].tolist() for site in "abc"]
    assert seen == [[0.0] * 3, [1.0] * 3, [7.0] * 3]


def test_nested_outputs_are_named_by_their_path():
    def nested(x):
        return x, [x + 1, (x + 2,)], None, 5, Pair(x + 3, {"a b/c": x + 4})

    sink = run(Inside(nested), torch.zeros(2), phases=("forward",))
    assert set(sink.names()) == {
        "root/forward/input",
        "root/forward/output",
        "root/forward/output.1.0",
        "root/forward/output.1.1.0",
        "root/forward/output.4.hidden",
        "root/forward/output.4.extra.a%20b%2Fc",
    }


@pytest.mark.parametrize(
    "value",
    [
        lambda x: ((x, x + 1), x + 2),
        lambda x: [[x], [x, [x]], {"0": x}],
        lambda x: {"a": (x, x), "b": x},
        lambda x: (None, x, (x,)),
    ],
)
def test_no_two_tensors_of_a_call_share_a_name(value):
    sink = run(Inside(lambda *args, **kwargs: value(args[1])), [torch.ones(1)] * 2, torch.ones(1))
    named = [(str(record.name), record.at) for record in sink.records]
    assert len(named) == len(set(named)) >= 3 + 2


def test_the_first_parameter_is_input_also_when_passed_by_keyword():
    class Keyword(nn.Module):
        def forward(self, hidden, mask=None):
            return hidden

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Keyword()

        def forward(self, x):
            return self.inner(hidden=x, mask=x.bool()) + self.inner(x, x.bool())

    sink = run(Outer(), torch.ones(2), select="inner/*", phases=("forward",))
    assert sink.names() == [
        "inner/forward/input",
        "inner/forward/input.1",
        "inner/forward/input.mask",
        "inner/forward/output",
    ]


def test_a_kwargs_only_call_has_gradients():
    class Keyword(nn.Module):
        def forward(self, *, hidden):
            return hidden * 3

    x = torch.ones(2, requires_grad=True)
    sink = tensortap.MemorySink()
    with tensortap.attach(model := Keyword(), sink, values="full", on_error="raise"):
        model(hidden=x).sum().backward()
    assert only(sink, "root/backward/grad_input.hidden")[1].tolist() == [3.0, 3.0]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(4, 6).t(),
        torch.randn(1, 5).expand(3, 5),
        torch.empty(0, 3),
        torch.tensor(2.5),
        torch.randn(3, dtype=torch.complex64),
        torch.randn(3, dtype=torch.complex64).conj(),
        torch.randn(3, dtype=torch.complex128),
        torch.arange(5, dtype=torch.int8),
        torch.tensor([True, False]),
        torch.randn(8).to(torch.float8_e4m3fn),
        torch.randn(8).to(torch.float8_e5m2),
        torch.randn(9).bfloat16()[1::2],
        torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0]),
    ],
    ids=lambda t: f"{str(t.dtype)[6:]}-{tuple(t.shape)}",
)
def test_every_kind_of_tensor_is_kept_bit_by_bit(tensor):
    sink = run(nn.Identity(), tensor, values="full", phases=("forward",))
    record, payload = only(sink, "root/forward/output")
    assert (record.shape, record.dtype) == (tuple(tensor.shape), str(tensor.dtype)[6:])
    assert payload.shape == tensor.shape
    bits = tensor.resolve_conj().contiguous()
    assert (
        payload.numpy(force=True).tobytes() == bits.numpy(force=True).tobytes()
        if (bits.dtype not in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2))
        else torch.equal(payload.view(torch.uint8), bits.view(torch.uint8))
    )
    assert record.stats.count == tensor.numel() * (2 if tensor.is_complex() else 1)


def test_what_has_no_values_is_said_in_the_coverage():
    sparse = torch.eye(3).to_sparse()
    for tensor, kind in ((torch.empty(3, device="meta"), "notes"), (sparse, "gaps")):
        sink = tensortap.MemorySink()
        with tensortap.attach(model := nn.Linear(1, 1), sink, phases=("param",)) as tap:
            model(torch.ones(1, 1))
            tap.record("by.hand/forward/x", tensor)
        assert [row["name"] for row in sink.coverage[kind]] == ["by.hand/forward/x"]


def test_tensors_without_memory_of_their_own_are_gaps_not_crashes():
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    sink = tensortap.MemorySink()
    with tensortap.attach(model, sink, phases=("forward",), on_error="raise"):
        with FakeTensorMode(allow_non_fake_inputs=True):
            model(torch.empty(2, 4))
        torch.func.vmap(model)(torch.randn(3, 2, 4))
        model(torch.randn(2, 4))
    reasons = {row["reason"].split(":")[0] for row in sink.coverage["gaps"]}
    assert reasons == {"FakeTensor", "inside a torch.func transform"}
    assert {record.at.step for record in sink.records} == {2}


def test_a_default_device_does_not_move_what_is_captured():
    with torch.device("meta"):
        sink = run(nn.Identity(), torch.ones(3, device="cpu"), values="full")
    assert only(sink, "root/forward/output")[1].tolist() == [1.0] * 3


def test_a_sample_is_strided_over_the_whole_tensor():
    x = torch.arange(10_000.0).reshape(100, 100)
    sink = run(nn.Identity(), x, values="sample", phases=("forward",))
    record, payload = only(sink, "root/forward/input")
    assert record.stride == 3
    assert torch.equal(payload, x.flatten()[::3])


def test_a_module_used_twice_is_two_calls_of_one_site():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = self.first

        def forward(self, x):
            return self.second(self.first(x))

    sink = run(Twice(), torch.randn(2, 4), backward=True)
    for name in ("first/forward/input", "first/forward/output", "first/backward/grad_output"):
        assert sorted(record.at.call for record, _ in sink.find(name)) == [0, 1]
    assert {"name": "second", "reason": "the same module as first, captured there", "count": 1} in (
        sink.coverage["notes"]
    )


def test_tied_parameters_are_recorded_under_each_name():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.embed(ids))

    model = Tied()
    sink = run(model, torch.tensor([[1, 2]]), backward=True, values="full")
    for phase, expected in (("param", model.head.weight), ("grad", model.head.weight.grad)):
        for site in ("embed", "head"):
            assert torch.equal(only(sink, f"{site}/{phase}/weight")[1], expected)


def test_the_run_is_described():
    sink = run(Mlp(), torch.randn(1, 8), metadata={"prompt": "hello"}, steps="0:3")
    info = sink.run
    assert info.model_class == "Mlp"
    assert info.metadata["prompt"] == "hello"
    assert info.settings["steps"] == "0:3"
    assert info.versions["torch"] == torch.__version__
    assert sink.coverage["complete"]


def test_a_selected_leaf_that_never_runs_is_a_gap():
    model = Mlp()
    model.forward = lambda x: x + model.up(x)[..., :8]
    model.up(torch.ones(1, 8))
    sink = run(model, torch.randn(1, 8), select="up/*,down/*", phases=("forward",))
    assert [(gap["name"], gap["reason"]) for gap in sink.coverage["gaps"]] == [
        ("down", "selected, but never called")
    ]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_forward_is_captured(context):
    with context():
        sink = run(Mlp(), torch.randn(2, 8), values="full")
    assert "down/forward/output" in sink.names()
    assert not [name for name in sink.names() if "/backward/" in name]


def test_autocast_records_the_dtype_that_was_computed():
    with torch.autocast("cpu", torch.bfloat16):
        sink = run(Mlp(), torch.randn(2, 8))
    assert only(sink, "up/forward/output")[0].dtype == "bfloat16"
    assert only(sink, "up/forward/input")[0].dtype == "float32"


def test_an_exception_inside_forward_passes_and_the_next_forward_is_fine():
    def sometimes(x):
        if x.sum() > 10:
            raise ValueError("too much")
        return x

    model = nn.Sequential(nn.Identity(), Inside(sometimes)).eval()
    sink = tensortap.MemorySink()
    with tensortap.attach(model, sink, on_error="raise", phases=("forward",)):
        for value in (1.0, 100.0, 2.0):
            with pytest.raises(ValueError, match="too much") if value > 5 else nullcontext():
                model(torch.full((2,), value))
    found = [(record.at.step, record.at.call) for record, _ in sink.find("root/forward/output")]
    assert found == [(0, 0), (2, 0)]


def train(model, x):
    torch.manual_seed(7)
    loss = model(x).square().mean()
    loss.backward()
    results = [loss.detach().clone(), *(p.grad.clone() for p in model.parameters())]
    model.zero_grad()
    return [*results, torch.get_rng_state()]


@pytest.mark.parametrize("values", ["stats", "full", "sample"])
def test_loss_gradients_and_random_numbers_are_bitwise_equal_with_the_tap_on(values):
    model, x = Stack(), torch.randn(4, 8, requires_grad=True)
    plain = train(model, x)
    with tensortap.attach(model, tensortap.MemorySink(), values=values, on_error="raise"):
        tapped = train(model, x)
    assert all(torch.equal(a, b) for a, b in zip(plain, tapped, strict=True))


def state(model):
    hooks = [p._post_accumulate_grad_hooks for p in model.parameters()]
    return [snapshot_of(m) for m in model.modules()], hooks, torch.optim.Optimizer.__dict__.copy()


def test_detach_leaves_every_dict_as_it_was():
    model = Stack()
    scaler = dict(vars(torch.amp.GradScaler))
    before = state(model)
    with tensortap.attach(model, tensortap.MemorySink(), on_error="raise"):
        train(model, torch.randn(4, 8))
        assert state(model) != before
    after = state(model)
    assert after[1:] == before[1:]
    for old, new in zip(before[0], after[0], strict=True):
        assert old.keys() == new.keys()
        assert all(old[key] == new[key] for key in old)
    assert dict(vars(torch.amp.GradScaler)) == scaler


def test_copies_of_a_tapped_model_are_not_tapped():
    model, x = Stack().eval(), torch.randn(2, 8)
    sink = tensortap.MemorySink()
    with tensortap.attach(model, sink, on_error="raise"):
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        for twin in twins:
            twin(x).sum().backward()
        assert tensortap.MemorySink().records == []
        model(x)
    assert {record.at.step for record in sink.records} == {0}


def test_an_attach_that_fails_leaves_nothing_behind():
    model = Stack()
    before = state(model)
    with pytest.raises(tensortap.SelectionError):
        tensortap.attach(model, tensortap.MemorySink(), select="nowhere.*")

    class Broken(tensortap.MemorySink):
        def open(self, run):
            raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        tensortap.attach(model, Broken())
    assert state(model) == before
    with tensortap.attach(model, sink := tensortap.MemorySink()), warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.ones(1, 8))
    assert sink.run is not None


def test_two_taps_on_two_models_can_be_detached_in_any_order():
    scaler = torch.amp.GradScaler.step
    models = [Mlp(), Mlp()]
    sinks = [tensortap.MemorySink(), tensortap.MemorySink()]
    taps = [tensortap.attach(m, s, on_error="raise") for m, s in zip(models, sinks, strict=True)]
    for model in models:
        model(torch.ones(1, 8))
    taps[0].detach()
    models[1](torch.ones(1, 8))
    taps[1].detach()
    assert torch.amp.GradScaler.step is scaler
    assert sinks[0].names() == sinks[1].names()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"select": "uq.*"}, r"matches nothing in this model.*Closest names: 'up/"),
        ({"select": ""}, "selects nothing"),
        ({"select": "re:("}, "not a regular expression"),
        ({"selekt": "*"}, "no option 'selekt'; did you mean 'select'"),
        ({"phases": ("forwards",)}, "choose from forward, backward, param, grad"),
        ({"steps": "0-3"}, "write numbers or ranges"),
        ({"values": "all"}, "choose from stats, full, sample"),
        ({"values": {"*": "everything"}}, "choose from stats, full, sample"),
        ({"max_pending": "lots"}, "is not a size"),
        ({"on_error": "ignore"}, "choose from warn, raise"),
        ({"using": "megatrn"}, "no integration 'megatrn'"),
        ({"metadata": "text"}, "metadata is a dictionary"),
        ({"select": 3}, "select=3 is of the wrong kind"),
        ({"values": 5}, "values=5 is of the wrong kind"),
        ({"phases": 5}, "phases=5 is of the wrong kind"),
    ],
)
def test_bad_options_say_what_is_allowed(options, says):
    with pytest.raises(tensortap.TensortapError, match=f"(?s){says}"):
        tensortap.attach(Mlp(), tensortap.MemorySink(), **options)


@pytest.mark.parametrize("thing", [None, "model", 3, [], [nn.Linear(1, 1), "x"], Mlp])
def test_what_is_not_a_module_cannot_be_tapped(thing):
    with pytest.raises(tensortap.ConfigError, match="attach"):
        tensortap.attach(thing, tensortap.MemorySink())


def test_the_second_argument_is_a_path_or_a_sink():
    with pytest.raises(tensortap.ConfigError, match="run directory or an object"):
        tensortap.attach(Mlp(), 5)


def test_attaching_twice_says_where_the_first_tap_is():
    model = Stack()
    with tensortap.attach(model.layers[0], tensortap.MemorySink()):
        with pytest.raises(tensortap.AlreadyAttached, match=r"its module 'layers\.0' has a tap"):
            tensortap.attach(model, tensortap.MemorySink())
        model(torch.ones(1, 8))
    with tensortap.attach(model, tensortap.MemorySink()):
        model(torch.ones(1, 8))


def test_a_capture_of_nothing_is_an_error():
    with pytest.raises(tensortap.CaptureError, match="model was not called"):
        tensortap.attach(Mlp(), tensortap.MemorySink()).detach()
    model = Mlp().eval()
    tap = tensortap.attach(model, tensortap.MemorySink(), steps="100:")
    model(torch.ones(1, 8))
    with pytest.raises(tensortap.CaptureError, match="there were 1 steps, counted from 0"):
        tap.detach()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"values": {"upp.*": "full"}}, r"values \('upp\.\*'\).*Closest names: 'up/\*'"),
        ({"select": "up/*,donw/*"}, r"select: the pattern 'donw/\*'.*'down/\*'"),
        ({"select": "*,!*/forward/inptu"}, r"the pattern '\*/forward/inptu' matches nothing"),
    ],
)
def test_a_pattern_that_matches_nothing_beside_others_is_a_warning(options, says):
    model = Mlp()
    with pytest.warns(tensortap.CaptureWarning, match=f"(?s){says}") as warned:
        tap = tensortap.attach(model, tensortap.MemorySink(), **options)
    assert warned[0].filename == __file__
    model(torch.ones(1, 8))
    tap.detach()


def test_a_selection_of_some_modules_makes_no_gap_of_the_others(tmp_path):
    model = torch.nn.Sequential(Mlp(), Mlp())
    with tensortap.attach(model, tmp_path / "run", select="*.down", on_error="raise") as tap:
        model(torch.ones(1, 8))
    assert not tap.coverage.report(steps=1)["gaps"]
    assert {name.split("/")[0] for name in tensortap.open_run(tmp_path / "run").names()} == {
        "0.down",
        "1.down",
    }


def test_patterns_that_could_match_are_not_warned_about():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sink = run(Mlp(), torch.ones(1, 8), select="up,!up/*/input.*,*/output.1,re:x.*")
    assert "up/forward/output" in sink.names()


def test_a_misspelt_variable_of_the_environment_is_a_warning(monkeypatch):
    monkeypatch.setenv("TENSORTAP_SELCT", "up/*")
    with pytest.warns(tensortap.CaptureWarning, match="TENSORTAP_SELCT.*'TENSORTAP_SELECT'"):
        run(Mlp(), torch.ones(1, 8))


def test_detach_all_ends_what_a_failed_cell_left():
    models = [Mlp(), Mlp()]
    taps = [tensortap.attach(model, tensortap.MemorySink()) for model in models]
    for model in models:
        model(torch.ones(1, 8))
    tensortap.detach_all()
    assert not any(tap.attached for tap in taps)
    tensortap.detach_all()


def test_what_is_awkward_to_walk_does_not_reach_the_model():
    looping = {}
    looping["self"] = looping

    class Awkward(dict):
        def items(self):
            raise RuntimeError("not yours")

    model = Inside(lambda x: (x, looping))
    assert "root/forward/output" in run(model, torch.ones(1)).names()
    with pytest.warns(tensortap.CaptureWarning, match="not yours"):
        with tensortap.attach(model := Inside(lambda x: Awkward(x=x)), tensortap.MemorySink()):
            assert type(model(torch.ones(1))) is Awkward
    with torch.inference_mode():
        leaf = torch.ones(1, requires_grad=True)
    run(nn.Identity(), leaf)


def test_wrappers_inside_a_model_have_no_names_of_their_own():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = nn.Sequential(checkpoint_wrapper(nn.Linear(4, 4)), nn.Linear(4, 4))
    sink = run(model, torch.ones(1, 4), backward=True)
    assert {name.split("/")[0] for name in sink.names()} == {"root", "0", "1"}
    assert next(r for r, _ in sink.find("0/param/weight")).native == "0._checkpoint_wrapped_module"


def test_a_parameter_without_a_shape_yet_is_refused():
    with pytest.raises(tensortap.NotSupported, match="run the model once"):
        tensortap.attach(nn.LazyLinear(3), tensortap.MemorySink())


def test_recording_what_is_no_tensor_is_refused_and_nothing_stops():
    with tensortap.attach(nn.Identity(), sink := tensortap.MemorySink()) as tap:
        with pytest.raises(tensortap.ConfigError, match=r"takes a torch\.Tensor, not float"):
            tap.record("loss.scale/forward/x", 3.0)
        tap.record("loss.scale/forward/x", torch.tensor(3.0))
        tap.record("loss.scale/forward/x", torch.tensor(4.0))
    assert [record.at.call for record in sink.records] == [0, 1]


def test_disabled_by_the_environment_nothing_is_installed(monkeypatch):
    monkeypatch.setenv("TENSORTAP_ENABLED", "0")
    model = Mlp()
    before = state(model)
    with tensortap.attach(model) as tap:
        assert not tap.attached
        assert state(model) == before
        tap.record("a/forward/b", torch.ones(1))
        tap.step()
    tensortap.attach(torch.jit.script(nn.Linear(1, 1)))


def test_a_rank_that_is_not_selected_installs_nothing():
    with tensortap.attach(Mlp(), tensortap.MemorySink(), ranks="1,3") as tap:
        assert not tap.attached


@pytest.mark.parametrize("select", ["layers.1.up/forward/output", "*.1.up/forward/output"])
def test_only_what_is_selected_is_hooked(select):
    model = Stack()
    with tensortap.attach(model, tensortap.MemorySink(), select=select):
        assert model.layers[1].up._forward_hooks
        assert not model.layers[1].down._forward_hooks
        assert not model.layers[0]._forward_hooks
        model(torch.ones(1, 8))


def test_ranks_that_there_are_not_are_a_warning():
    with pytest.warns(tensortap.CaptureWarning, match="ranks='8', but the ranks are 0 to 0"):
        assert not tensortap.attach(Mlp(), tensortap.MemorySink(), ranks="8").attached


def test_detach_all_goes_on_after_a_tap_that_saw_nothing():
    unused, used = Mlp(), Mlp()
    taps = [tensortap.attach(model, tensortap.MemorySink()) for model in (unused, used)]
    used(torch.ones(1, 8))
    with pytest.warns(tensortap.CaptureWarning, match="captured nothing"):
        tensortap.detach_all()
    assert not any(tap.attached for tap in taps)

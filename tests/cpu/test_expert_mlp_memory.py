"""What is kept for the backward pass, and how large one allocation may be (laws 4 and 5)."""

import weakref
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import turnout
from problems import GPT_OSS, LORA_LEAVES, assert_same, output_gradient, random_problem, run
from turnout.experts import ops, passes

LAYOUTS = {
    "plain": {},
    "transposed, biases": {"transposed": True, "bias": True, "activation": GPT_OSS},
    "not gated": {"activation": turnout.Activation(act="relu2", gated=False)},
    "weight on input": {"weight_on_input": True},
}


def saved_for_backward(problem, needs, **options):
    """{storage: (bytes, shape)} of what autograd keeps, the problem's own weights left out."""
    fresh = problem.mapped(torch.Tensor.detach)
    for name in needs:
        fresh[name].requires_grad_()
    parameters = set(fresh.leaves) - {"x", "weights_TK"}
    given = {fresh[name].untyped_storage().data_ptr() for name in parameters}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given and storage.nbytes():
            kept[storage.data_ptr()] = (storage.nbytes(), tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = fresh.call(**options)
    assert out.requires_grad
    return kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recompute", ["none", "gate_up"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("needs", ["LoRA", "full"])
def test_no_more_is_kept_than_the_law_says(dtype, recompute, layout, needs):
    tokens, top_k, hidden, ranks = 64, 3, 24, (4, 3)
    problem = random_problem(
        tokens=tokens, top_k=top_k, hidden=hidden, dtype=dtype, **LAYOUTS[layout]
    )
    needs = problem.trained_by_lora if needs == "LoRA" else tuple(problem.leaves)
    kept = saved_for_backward(problem, needs, recompute=recompute)
    rows, wide = tokens * top_k, problem["b_up"].shape[0]
    bytes_each = {
        "x": tokens * hidden * dtype.itemsize,
        "z": 0 if recompute == "gate_up" else rows * wide * dtype.itemsize,
        "S*R": rows * sum(ranks) * 4,  # this back end computes adapters in float32 at least
        # Indices and weights as given; row to slot, slot to row; offsets.
        "routing": rows * (8 + 4) + 2 * rows * 8 + (problem.num_experts + 1) * 4,
    }
    assert sum(size for size, _ in kept.values()) <= sum(bytes_each.values())
    shapes = [shape for _, shape in kept.values()]
    assert ((rows, wide) in shapes) == (recompute == "none")
    assert (rows, hidden) not in shapes, "the gathered input or the per-expert output is kept"


def test_the_definition_keeps_more():
    """Else the meter above sees nothing."""
    problem = random_problem(tokens=64)
    needs = problem.trained_by_lora
    ours = saved_for_backward(problem, needs)
    plain = saved_for_backward(problem, needs, function=turnout.reference.expert_mlp)
    total = [sum(size for size, _ in kept.values()) for kept in (ours, plain)]
    assert total[1] > 2 * total[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_recompute_changes_no_bit(layout, dtype):
    problem = random_problem(dtype=dtype, lora_dtype=torch.float32, **LAYOUTS[layout])
    assert_same(run(problem, recompute="gate_up"), run(problem))


@pytest.mark.parametrize("recompute", ["none", "gate_up"])
def test_nothing_is_kept_behind_autograds_back(recompute):
    """Saved-tensor hooks do not see what a Function hangs on its context; the allocator does."""
    problem = random_problem(tokens=64)
    needs = problem.trained_by_lora
    kept = sum(size for size, _ in saved_for_backward(problem, needs, recompute=recompute).values())
    fresh = problem.mapped(torch.Tensor.detach)
    for name in needs:
        fresh[name].requires_grad_()
    shared = sum(t.nbytes for t in (fresh["x"], fresh["weights_TK"], fresh.experts))
    outs = []
    fresh.call(recompute=recompute)
    allocated = memory_events(lambda: outs.append(fresh.call(recompute=recompute)))
    assert sum(allocated) <= kept - shared + outs[0].nbytes


def test_shapes_of_what_is_kept_do_not_depend_on_the_routing():
    """Checkpointing recomputes with another routing when a near-tie flips (T5, T6)."""
    problem = random_problem(tokens=20)
    everywhere = [problem.experts, problem.experts * 0, problem.experts * 0 + problem.num_experts]
    shapes = [
        [shape for _, shape in saved_for_backward(problem.changed(experts=e), LORA_LEAVES).values()]
        for e in everywhere
    ]
    assert shapes[0] == shapes[1] == shapes[2]


def memory_events(function):
    """Bytes of every allocation, and of every release as a negative number."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]"]


def largest_allocation(function):
    """Bytes of the largest single allocation, buffers inside of operators included."""
    return max(memory_events(function))


SIZES = {"tokens": 32, "top_k": 2, "num_experts": 16, "hidden": 64, "intermediate": 48}


def smaller_stack(problem):
    return min(problem[name].nbytes for name in ("gate_up", "down"))


def train(problem, function=turnout.expert_mlp, autocast=False, **options):
    fresh = problem.mapped(torch.Tensor.detach)
    for name in problem.trained_by_lora:
        fresh[name].requires_grad_()
    dout = output_gradient(problem)

    def step():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = fresh.call(function, **options)
        out.backward(dout)

    return step


@pytest.mark.parametrize("routing", ["spread", "one expert"])
@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ({}, {}),
        ({}, {"autocast": True}),
        ({"transposed": True, "bias": True, "activation": GPT_OSS}, {}),
        ({"transposed": True}, {"autocast": True, "recompute": "gate_up"}),
        ({}, {"recompute": "gate_up"}),
        ({}, {"expert_dropout": 0.1}),
        ({"weight_on_input": True}, {}),
        ({"dtype": torch.bfloat16, "lora_dtype": torch.float32}, {}),
        ({"dtype": torch.bfloat16, "lora_dtype": torch.float32, "transposed": True}, {}),
        ({"dtype": torch.float32}, {"backend": "torch"}),
    ],
    ids=str,
)
def test_lora_training_allocates_nothing_of_the_size_of_a_stack(layout, options, routing):
    problem = random_problem(**SIZES, **layout)
    if routing == "one expert":
        problem = problem.changed(experts=torch.full_like(problem.experts, 3))
    rows, widest = problem.experts.numel(), 2 * SIZES["intermediate"]
    stack = min(problem[name].numel() for name in ("gate_up", "down"))
    assert rows * widest <= stack // 4
    largest = largest_allocation(train(problem, **options))
    assert largest < smaller_stack(problem) / 2


def test_reading_a_strided_stack_copies_one_expert_at_most():
    problem = random_problem(**SIZES)
    view = {n: problem[n].transpose(1, 2).contiguous().transpose(1, 2) for n in ("gate_up", "down")}
    problem = problem.changed(**view)
    assert largest_allocation(train(problem)) < smaller_stack(problem) / 2


@pytest.mark.parametrize("how", ["fold", "cast", "transpose", "gradient"])
def test_the_meter_sees_a_copy_of_a_stack(how):
    """What the law forbids, done on purpose."""
    problem = random_problem(**SIZES)
    gate_up, a, b = (problem[name] for name in ("gate_up", "a_up", "b_up"))
    work = {
        "fold": lambda: gate_up + torch.einsum("ore,eri->eoi", b, a),
        "cast": lambda: gate_up.bfloat16(),
        "transpose": lambda: gate_up.transpose(1, 2).contiguous(),
        "gradient": lambda: run(problem, ("down",)),
    }[how]
    assert largest_allocation(work) >= smaller_stack(problem) / 2


def kept_z(problem, needs, **options):
    """The output, and z as autograd keeps it."""
    found = []
    rows, wide = problem.experts.numel(), problem["b_up"].shape[0]

    def pack(tensor):
        if tensor.shape == (rows, wide):
            found.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = problem.call(**options)
    (z,) = found
    return out, z


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("retain", [False, True])
def test_the_largest_intermediate_outlives_its_last_reader(layout, retain, monkeypatch):
    """Full fine-tuning: z goes when dz is there, unless the graph is asked for again."""
    monkeypatch.setattr(ops, "RELEASED_BYTES", 1)
    problem = random_problem(tokens=64, **LAYOUTS[layout])
    needs = tuple(problem.leaves)
    expected = run(problem, needs)
    fresh = problem.mapped(torch.Tensor.detach)
    for name in needs:
        fresh[name].requires_grad_()
    out, z = kept_z(fresh, needs)
    leaves = [fresh[name] for name in needs]
    grads = torch.autograd.grad(out, leaves, output_gradient(problem), retain_graph=retain)
    assert bool(z.untyped_storage().nbytes()) == retain
    assert_same(dict(zip(needs, grads, strict=True)), {name: expected[name] for name in needs})
    if retain:
        again = torch.autograd.grad(out, leaves, output_gradient(problem))
        assert_same(dict(zip(needs, again, strict=True)), dict(zip(needs, grads, strict=True)))
        assert not z.untyped_storage().nbytes()


def test_small_or_lora_intermediates_stay():
    problem = random_problem(tokens=64)
    for needs in (problem.trained_by_lora, tuple(problem.leaves)):
        fresh = problem.mapped(torch.Tensor.detach)
        for name in needs:
            fresh[name].requires_grad_()
        out, z = kept_z(fresh, needs)
        out.sum().backward()
        assert z.untyped_storage().nbytes()


@pytest.mark.parametrize("recompute", ["none", "gate_up"])
def test_prepared_adapters_outlive_their_last_reader(recompute, monkeypatch):
    """They are as large as half of their gradients, which come after them."""
    made, gemms, grams = [], [], []
    factors, gemm, gram = passes.factors, passes.grouped_gemm, passes.grouped_gram

    def alive():
        return [ref() is not None for ref in made]

    def watched_factors(*args, **options):
        found = [
            replace(f, narrow_ERK=f.narrow_ERK.clone(), tail_ENR=f.tail_ENR.clone())
            for f in factors(*args, **options)
        ]
        made[:] = [weakref.ref(t) for f in found for t in (f.narrow_ERK, f.tail_ENR)]
        return found

    def watched_gemm(*args, **options):
        gemms.append(alive())
        return gemm(*args, **options)

    def watched_gram(*args, **options):
        grams.append(alive())
        gram(*args, **options)

    monkeypatch.setattr(passes, "factors", watched_factors)
    monkeypatch.setattr(passes, "grouped_gemm", watched_gemm)
    monkeypatch.setattr(passes, "grouped_gram", watched_gram)
    problem = random_problem(tokens=32, top_k=2, dtype=torch.float32)
    run(problem, problem.trained_by_lora, recompute=recompute)
    # forward: x A, up, h A, down; the first two read those of the up projection
    assert gemms[:4] == [
        [True] * 4,
        [True] * 4,
        [False, False, True, True],
        [False, False, True, True],
    ]
    # A and B of the down projection, then of the up projection, whose factors dx still reads
    if recompute == "none":
        assert grams[:2] == [[True, True, False, False]] * 2
    assert not any(map(any, grams[2:])), grams

"""Connectors: what they compute, who trains them, and what becomes of them."""

import json
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from engines import How, fused, per_node, trained
from runs import assert_same_end, in_process, metrics, options, saved_state, small

import ktg_jax as ktg
from experiments import evaluate, train
from ktg_jax import Edge, Graph, GraphState, InputError, Node, Outputs
from ktg_jax.connectors import KEY, connected, init_connector, without_connectors
from ktg_jax.stage_losses import feature_losses
from ktg_jax.training.batches import Arrays, Batches
from ktg_jax.training.task import Task

HINT: dict[str, Any] = {"gate": "through", "loss": {"features": 2.0, "kl": 1.0}}
FIELDS: dict[str, Any] = {
    "nodes": [
        {"name": "student", "model": "staged"},
        {"name": "broad", "model": "staged_wide"},
        {"name": "other", "model": "staged", "classes": 7},
    ],
    "gates": [
        ["through", {**HINT, "connector": "conv_conv"}, {"gate": "linear", "connector": "linear"}],
        [{"gate": "through"}, "linear", "cutoff"],
        ["cutoff"] * 3,
    ],
}
FIELDS["gates"][1][0] = {"gate": "correct", "connector": "linear_linear"}
GRAPH = Graph.from_json(FIELDS)
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (16, 8, 8, 1), np.uint8)
LABELS = np.asarray(np.arange(16) % 5, np.int32)
STAGED, WIDE, OTHER = (
    ktg.from_linen(tiny_models.Staged(classes, widths))
    for classes, widths in ((5, (4, 6)), (5, (8, 12)), (7, (4, 6)))
)
FNS = (STAGED, WIDE, OTHER)
OPTIMIZER = ktg.sgd(0.1)


def initial(graph: Graph = GRAPH) -> GraphState:
    return ktg.init_state(graph, FNS, OPTIMIZER, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))


# --- by hand


def test_two_layers_have_a_relu_between_them() -> None:
    first = {"kernel": jnp.array([[1.0, -1.0]]), "bias": jnp.array([0.0, 1.0])}
    second = {"kernel": jnp.array([[1.0], [10.0]]), "bias": jnp.array([0.5])}
    ends = Outputs(jnp.array([[3.0], [-3.0]])), Outputs(jnp.zeros((2, 1)))
    found = connected({"logits": {"layer1": first, "layer2": second}}, *ends)
    assert found.logits.tolist() == [[3.5], [40.5]]


def test_stages_get_the_size_and_channels_of_the_sender() -> None:
    ours = Outputs(jnp.zeros((2, 5)), (jnp.ones((2, 4, 4, 3)), jnp.ones((2, 2, 2, 3))))
    theirs = Outputs(jnp.zeros((2, 5)), (jnp.ones((2, 8, 8, 7)), jnp.ones((2, 1, 1, 9))))
    params = init_connector(("conv", "linear"), jax.random.key(0), ours, theirs)
    chex.assert_shape(params["stage1"]["layer1"]["kernel"], (3, 7))
    found = connected(params, ours, theirs)
    assert [stage.shape for stage in found.stages] == [(2, 8, 8, 7), (2, 1, 1, 9)]
    kernel = params["stage1"]["layer1"]["kernel"]
    np.testing.assert_allclose(found.stages[0][1, 3, 3], kernel.sum(0), rtol=1e-5)
    np.testing.assert_array_equal(found.logits, jnp.zeros((2, 5)))


def test_an_edge_sees_its_receiver_behind_the_connector() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    student, teacher = jax.random.normal(keys[0], (4, 5)), jax.random.normal(keys[1], (4, 7))
    edge = Edge("through", weight=3.0, temperature=2.0, connector="linear")
    nodes = [Node("staged", "a"), Node("staged", "b", classes=7)]
    edges = Graph(nodes, [["through", edge], ["cutoff", "cutoff"]]).edge_arrays
    layer = {"kernel": jax.random.normal(keys[2], (5, 7)), "bias": jnp.ones(7)}
    labels = jnp.arange(4)

    def loss(student: Any, layer: Any, teacher: Any) -> Any:
        connectors = [{"b": {"logits": {"layer1": layer}}}, {}]
        return ktg.edge_losses([student, teacher], labels, edges, 1.0, connectors=connectors)[0, 1]

    def by_hand(student: Any, layer: Any) -> Any:
        seen = student @ layer["kernel"] + layer["bias"]
        return 3.0 * jnp.mean(ktg.kl_divergence(seen, teacher, 2.0))

    given = student, layer, teacher
    np.testing.assert_allclose(loss(*given), by_hand(student, layer), rtol=1e-5)
    gradients = jax.grad(loss, argnums=(0, 1, 2))(*given)
    chex.assert_trees_all_close(gradients[:2], jax.grad(by_hand, argnums=(0, 1))(student, layer),
                                rtol=1e-4, atol=1e-6)  # fmt: skip
    assert not gradients[2].any()


def test_a_node_of_other_classes_is_never_right() -> None:
    student, teacher = jnp.zeros((4, 5)), jax.nn.one_hot(jnp.arange(4), 7)
    gates = [["through", Edge("correct", connector="linear")], ["cutoff"] * 2]
    nodes = [Node("staged", "a"), Node("staged", "b", classes=7)]
    layer = {"kernel": jnp.ones((5, 7)), "bias": jnp.zeros(7)}
    given = [student, teacher], jnp.arange(4), Graph(nodes, gates).edge_arrays, 1.0
    connectors = [{"b": {"logits": {"layer1": layer}}}, {}]
    _, found = ktg.graph_gradients(*given, connectors=connectors)
    assert found["edge_losses"][0, 1] == 0
    assert np.isnan(found["accuracy"]).tolist() == [False, True]
    with pytest.raises(
        InputError, match=r"connectors: .* the parameters of the one from b to node"
    ):
        ktg.edge_losses(*given)


def test_without_a_connector_it_is_said_what_is_missing() -> None:
    logits = [jnp.zeros((4, 5)), jnp.zeros((4, 7))]
    gates = jnp.array([[0, 0], [1, 1]])
    with pytest.raises(InputError, match=r"classes: got 7; allowed: 5, .*connector such as linear"):
        ktg.edge_losses(logits, jnp.arange(4), gates, 1.0)
    assert ktg.edge_losses(logits, jnp.arange(4), jnp.array([[0, 1], [1, 1]]), 1.0)[0, 1] == 0
    stages = [Outputs(jnp.zeros((4, 5)), (jnp.ones((4, 2, 2, c)),)) for c in (3, 4)]
    edges = Graph(["cnn", "cnn"], [["through", Edge(loss="features")], ["cutoff"] * 2]).edge_arrays
    with pytest.raises(InputError, match="connector"):
        ktg.edge_losses(stages, jnp.arange(4), edges, 1.0)


# --- training


def test_a_step_trains_each_with_the_loss_of_its_edge() -> None:
    state, images = initial(), jnp.asarray(IMAGES / np.float32(255))
    assert {name: sorted(c) for name, c in state.params[0][KEY].items()} == {
        "broad": ["stage1", "stage2"],
        "other": ["logits"],
    }
    assert list(state.params[1][KEY]) == ["student"]
    assert KEY not in state.params[2]

    def by_hand(params: Any) -> Any:
        network, connectors = without_connectors(params)
        (z, stages), _ = STAGED.stages(network, state.model_state[0], images, True)  # type: ignore[misc]
        (theirs, seen), _ = WIDE.stages(  # type: ignore[misc]
            without_connectors(state.params[1])[0], state.model_state[1], images, True
        )
        other, _ = OTHER.apply(state.params[2], state.model_state[2], images, False)
        behind = connected(connectors["broad"], Outputs(z, stages), Outputs(theirs, seen))
        hint = jnp.mean(feature_losses(behind.stages, seen))
        layer = connectors["other"]["logits"]["layer1"]
        far = jnp.mean(ktg.kl_divergence(z @ layer["kernel"] + layer["bias"], other))
        near = jnp.mean(ktg.kl_divergence(z, theirs))
        return jnp.mean(ktg.cross_entropy(z, LABELS)) + 2 * hint + near + 0.5 * far

    new, found = ktg.train_step(
        state, images, LABELS, GRAPH.edge_arrays, 0.5, node_fns=FNS, optimizer=OPTIMIZER
    )
    np.testing.assert_allclose(found["loss"][0], by_hand(state.params[0]), rtol=1e-5)
    gradients = jax.grad(by_hand)(state.params[0])
    expected, _ = ktg.node_update(state.params[0], state.opt_state[0], gradients,
                                  optimizer=OPTIMIZER)  # fmt: skip
    chex.assert_trees_all_close(new.params[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [per_node, fused(2), fused(batched=True)],
    ids=["per node", "two a call", "batched"],
)
def test_all_engines_train_alike(how: How) -> None:
    task = Task(FNS, OPTIMIZER, Batches(16, 8, 1, True), (8, 8, 1), 4)
    data = Arrays(IMAGES, LABELS)
    (expected, means), (found, others) = (
        trained(each, task, GRAPH, initial(), data) for each in (fused(), how)
    )
    chex.assert_trees_all_close(found.params, expected.params, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(others, means, rtol=1e-4)
    assert np.isnan(means["accuracy"]).tolist() == [False, False, True]


# --- graphs


def test_they_are_written_as_they_are_read() -> None:
    written = json.loads(GRAPH.to_json())
    assert written["gates"][0][1] == FIELDS["gates"][0][1]
    assert written["gates"][0][2] == {"gate": "linear", "loss": "kl", "connector": "linear"}
    assert written["nodes"][2]["classes"] == 7
    assert Graph.from_json(GRAPH.to_json()) == GRAPH
    assert GRAPH.edges[0][1].says == "2 features + kl, by conv_conv"
    edge = Edge(loss={"features": 1, "kl": 1}, connector="linear + conv")
    both = Graph(["cnn", "cnn"], [["through", edge], ["cutoff"] * 2])
    assert both.edges[0][1].connector == "conv+linear"
    cut = Graph(["cnn", "cnn"], [["through", Edge("cutoff", connector="linear")], ["through"] * 2])
    assert cut.connectors == ()


def test_graphs_that_differ_by_one_train_differently() -> None:
    def graph(*edges: Edge) -> Graph:
        teachers = [Node("cnn", weights="w")] * len(edges)
        rows = [["cutoff"] * (len(edges) + 1)] * len(edges)
        return Graph(["cnn", *teachers], [["through", *edges], *rows])

    plain, by = Edge(), Edge(connector="linear")
    assert graph(plain, plain).equivalent(graph(Edge(weight=2.0)))
    assert not graph(by, by).equivalent(graph(Edge(weight=2.0, connector="linear")))
    assert not graph(by).equivalent(graph(plain))
    assert graph(by, plain).equivalent(graph(plain, by))


@pytest.mark.parametrize(
    ("edge", "field", "allowed"),
    [
        ({"connector": "convolution"}, "gates[0][1].connector", "conv, conv_conv, linear"),
        ({"connector": 3}, "gates[0][1].connector", "conv, conv_conv, linear"),
        ({"connector": "linear+linear_linear"}, "gates[0][1].connector", "one of logits at most"),
        ({"connector": "conv"}, "gates[0][1].connector", "no loss of the edge is on stages"),
        ({"connector": "linear", "loss": "features"}, "gates[0][1].connector", "all losses"),
    ],
)
def test_one_that_nothing_has_a_use_for_is_refused(
    edge: dict[str, Any], field: str, allowed: str
) -> None:
    with pytest.raises(InputError) as caught:
        Graph(["cnn", "cnn"], [["through", {"gate": "through", **edge}], ["through"] * 2])
    assert (caught.value.field, allowed in caught.value.allowed) == (field, True), caught.value


@pytest.mark.parametrize(
    ("fields", "field", "allowed"),
    [
        ({"nodes": [{"model": "cnn", "classes": 0}]}, "nodes[0].classes", "at least 1"),
        ({"nodes": [{"model": "cnn", "classes": 7}]}, "nodes[0].classes", "the target has"),
        ({"gates": [[{"gate": "through", "connector": "linear"}]]}, "gates[0][0].connector",
         "a label edge has one end"),
        ({"nodes": ["cnn", {"model": "cnn", "classes": 7}], "gates": [["through"] * 2] * 2},
         "gates[1][1]", "cutoff: node cnn-1 has other classes"),
        ({"nodes": [{"model": "cnn", "name": "a"}, {"model": "cnn", "name": "b", "classes": 7},
                    {"ensemble": ["a", "b"]}],
          "gates": [["through", "cutoff", "through"], ["cutoff"] * 3, ["cutoff"] * 3]},
         "nodes[2].ensemble", "the classes of the data"),
    ],
)  # fmt: skip
def test_other_classes_have_their_place(fields: dict[str, Any], field: str, allowed: str) -> None:
    given = {"nodes": [{"model": "cnn"}], "gates": [["through"]], **fields}
    given["nodes"] = [{"model": n} if isinstance(n, str) else n for n in given["nodes"]]
    with pytest.raises(InputError) as caught:
        Graph.from_json(given)
    assert (caught.value.field, allowed in caught.value.allowed) == (field, True), caught.value


def test_params_that_are_no_dict_are_refused() -> None:
    fns = ktg.NodeFns(lambda rng, x: (jnp.ones(()), {}), lambda p, s, x, t: (p * x[:, :5, 0, 0], s))
    graph = Graph(["cnn", "cnn"], [["through", Edge(connector="linear")], ["through"] * 2])
    with pytest.raises(InputError, match="a network whose params are a dict"):
        ktg.init_state(graph, [fns, fns], OPTIMIZER, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))


# --- runs


@pytest.fixture
def teacher(tmp_path: Path) -> str:
    """A network of seven classes."""
    file = tmp_path / "teacher.safetensors"
    fns = ktg.from_linen(tiny_models.Staged(7))
    network = fns.init(jax.random.key(1), jnp.zeros((1, 8, 8, 1)))
    ktg.save_node(file, *network, model="staged", num_classes=7, image_shape=(8, 8, 1))
    return str(file)


def run_of(workdir: Path, fields: dict[str, Any], **changes: Any) -> Any:
    file = workdir.with_suffix(".json")
    file.write_text(json.dumps(fields))
    return in_process(train.main, *options(small(workdir, graph=str(file), models=(), **changes)))


@pytest.mark.slow
def test_a_run_keeps_them_resumes_them_and_exports_the_network_alone(
    tmp_path: Path, teacher: str
) -> None:
    student, broad, other = FIELDS["nodes"]
    fields = FIELDS | {"nodes": [student, broad, other | {"weights": teacher}]}
    for name in ("whole", "again"):
        ended = run_of(tmp_path / name, fields, epochs=2)
        assert (ended.code, ended.err) == (0, "")
    (tmp_path / "again" / "result.json").unlink()
    (tmp_path / "again" / "checkpoints" / "2").rename(tmp_path / "gone")
    assert run_of(tmp_path / "again", fields, epochs=2).code == 0
    assert_same_end(tmp_path / "whole", tmp_path / "again")
    state = saved_state(tmp_path / "whole", 2)
    assert f"nodes.student.params.{KEY}.broad.stage1.layer2.kernel" in state
    other = metrics(tmp_path / "whole")[-1]["nodes"][2]
    assert (other["train_accuracy"], other["val_accuracy"]) == (None, None)
    file = tmp_path / "student.safetensors"
    ended = in_process(evaluate.main, tmp_path / "whole", "--export", file)
    assert ended.code == 0, ended.err
    _, params, _ = ktg.load_node(file)
    assert sorted(params) == ["classifier", "norm", "stage1_conv", "stage2_conv"]
    pair = [{"model": "staged", "name": name} for name in ("student", "broad")]
    pair[0]["weights"] = str(tmp_path / "whole")
    by = {"gate": "through", "connector": "linear"}
    after = {"nodes": pair, "gates": [["through", by], ["through", "through"]]}
    ended = run_of(tmp_path / "after", after, epochs=1)
    assert (ended.code, ended.err) == (0, "")


@pytest.mark.parametrize(
    ("edge", "said"),
    [
        ({"gate": "through"}, "classes: got 7; allowed: 10, the receiver's, or an edge with a"),
        ({"gate": "through", "loss": "features", "connector": "conv"}, "stages"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_computed(
    tmp_path: Path, teacher: str, edge: dict[str, Any], said: str
) -> None:
    student = "tiny" if "loss" in edge else "staged"
    models = [{"model": student}, {"model": "staged", "classes": 7, "weights": teacher}]
    ended = run_of(
        tmp_path / "run", {"nodes": models, "gates": [["through", edge], ["cutoff"] * 2]}
    )
    assert ended.code == 2
    assert said in ended.err, ended.err
    assert not (tmp_path / "run").exists()

"""What each device computes and holds, by placement."""

import jax
import pytest

from benchmarks import placements


@pytest.mark.slow
def test_devices_hold_their_own_nodes_or_share_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placements, "MODEL", "cnn")
    assert len(jax.devices()) == 2
    one, data, nodes = (
        placements.load_of(how, 2, devices, 8)
        for how, devices in (("data", 1), ("data", 2), ("nodes", 2))
    )
    assert (one.nodes, data.nodes, nodes.nodes) == (2, 2, 1)
    assert data.gflop == pytest.approx(one.gflop / 2, rel=0.05)
    assert nodes.gflop == pytest.approx(one.gflop / 2, rel=0.05)
    assert data.state_mib == one.state_mib == pytest.approx(2 * nodes.state_mib, rel=1e-3)

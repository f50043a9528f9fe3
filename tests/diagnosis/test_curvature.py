"""The Hessian's products against autograd's own Hessian; its eigenvectors against those of a known matrix."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fasc.diagnosis.curvature import compare_with_hessian, hessian_product, leading_eigenvectors
from fasc.diagnosis.dependence import DEPENDENCE_NEEDS
from fasc.diagnosis.overlap import overlap
from fasc.model.groups import find_groups
from fasc.model.options import LayersConfig
from fasc.statistics.collect import collect_moments
from fasc.statistics.options import CalibrationConfig
from tests.conftest import tiny_model


@pytest.mark.parametrize("kind", ["q_proj+k_proj+v_proj", "down_proj"])
def test_the_product_is_that_of_the_whole_hessian_with_signs(kind, tokens):
    model = tiny_model().double()
    text = tokens[:1, :4]
    group = next(one for one in find_groups(model, LayersConfig()) if one.kind == kind and one.block == 1)

    def loss(shift):
        handles = [
            model.get_submodule(layer.name).register_forward_pre_hook(lambda _m, args: (args[0] + shift, *args[1:]))
            for layer in group.layers
        ]
        logits = model(input_ids=text, use_cache=False).logits
        for handle in handles:
            handle.remove()
        return torch.nn.functional.cross_entropy(logits[0, :-1], text[0, 1:], reduction="sum")

    d = group.d_in
    with sdpa_kernel(SDPBackend.MATH):
        whole = torch.autograd.functional.hessian(loss, torch.zeros(1, 4, d, dtype=torch.float64)).view(4, d, 4, d)
    vector = torch.randn(d, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    diagonal = sum(whole[t, :, t] for t in range(4)) @ vector / 4
    draws, total = 64, torch.zeros(d, dtype=torch.float64)
    for seed in range(draws):
        signs = (torch.randint(2, (1, 4, 1), generator=torch.Generator().manual_seed(seed)) * 2 - 1).double().view(4)
        expected = torch.einsum("t,tisj,s,j->i", signs, whole, signs, vector) / 4
        with hessian_product(model, text, group, seed=seed) as product:
            result = product(vector)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)  # norms compute in float32
        total += result
    spread = float((total / draws - diagonal).norm() / diagonal.norm())
    assert spread < 0.5
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_lanczos_finds_the_leading_eigenvectors():
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(30, 30, generator=generator, dtype=torch.float64))[0]
    values = torch.linspace(-3, 8, 30, dtype=torch.float64)
    matrix = basis @ torch.diag(values) @ basis.mT
    leading, vectors = leading_eigenvectors(lambda v: matrix @ v, 30, 4, what="a test")
    torch.testing.assert_close(leading, values.flip(0)[:4], rtol=1e-3, atol=1e-3)
    assert overlap(vectors, basis[:, -4:]) == pytest.approx(1, abs=1e-4)


def test_the_comparison_with_the_hessian_has_a_row_for_every_group(model, tokens):
    statistics = collect_moments(model, tokens, DEPENDENCE_NEEDS, calibration=CalibrationConfig(batch_tokens=160))
    names = list(statistics.groups)[-2:]
    rows = compare_with_hessian(model, statistics, tokens[:4], names, 5)
    assert [row["group"] for row in rows] == names
    for row in rows:
        assert 0 <= row["fisher"] <= 1 + 1e-9
        assert row["chance"] == 5 / statistics.groups[row["group"]].group.d_in
        assert row["eigenvalues"] == sorted(row["eigenvalues"], reverse=True)
        assert row["rho"] > 0

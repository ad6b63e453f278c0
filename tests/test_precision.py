"Products in bfloat16: the hardware's, their imitation in float32, and what is rounded only once."

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny import noise, tiny, tiny_market
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from lora_recycle import precision
from lora_recycle.core import generator
from lora_recycle.method import backbone as backbones
from lora_recycle.method import inversion
from lora_recycle.method.backbone import encode, normalise, round_weights
from lora_recycle.method.inversion import InvertConfig, Priors, bn_prior, invert
from lora_recycle.precision import is_low, multiply_in, ready_network


def differ(x, y):
    return ((x.float() - y).norm() / y.norm()).item()


def find_gradient(backbone, images):
    "Of the squared features, by the images"
    x = normalise(images, backbone).requires_grad_()
    features = encode(backbone, x).features.float()
    return torch.autograd.grad(features.square().sum(), x)[0]


def test_rounded_products_are_those_of_bfloat16(monkeypatch):
    "A transformer's features and gradients are as far from float32 as torch's own, on the same side"
    backbone, images = tiny(), noise(6)
    exact = find_gradient(backbone, images)
    found = {}
    for there in (True, False):
        monkeypatch.setattr(precision, 'has_bfloat16', lambda device: there)
        with multiply_in('bfloat16', 'cpu'):
            assert (_get_current_dispatch_mode() is None) == there
            found[there] = find_gradient(backbone, images)
    apart = differ(found[True], exact)
    assert 1e-3 < apart < 0.1
    assert differ(found[False], found[True]) < apart
    assert 0.5 < differ(found[False], exact) / apart < 2


def test_attention_is_as_near_to_float32_as_torchs_own(monkeypatch):
    "What its backward pass needs of the softmax stays in float32, as torch keeps it"
    q, k, v = 3 * torch.randn(3, 2, 2, 40, 16, generator=generator(0, 'attention'))

    def find_gradients():
        given = [x.clone().requires_grad_() for x in (q, k, v)]
        x = torch.nn.functional.scaled_dot_product_attention(*given)
        return torch.cat(torch.autograd.grad(x.float().square().sum(), given))

    exact, gaps = find_gradients(), []
    for there in (True, False):
        monkeypatch.setattr(precision, 'has_bfloat16', lambda device: there)
        with multiply_in('bfloat16', 'cpu'):
            gaps.append(differ(find_gradients(), exact))
    assert 1e-3 < gaps[1] < 1.1 * gaps[0], gaps


def test_nothing_is_rounded_in_float32_nor_afterwards(monkeypatch):
    monkeypatch.setattr(precision, 'has_bfloat16', lambda device: False)
    a, b = torch.randn(2, 9, 9, generator=generator(0))
    with multiply_in('float32', 'cpu'):
        assert torch.equal(a @ b, torch.matmul(a, b)) and _get_current_dispatch_mode() is None
    with pytest.raises(KeyError):
        with multiply_in('bfloat16', 'cpu'):
            assert (a @ b).dtype == torch.bfloat16
            raise KeyError
    assert (a @ b).dtype == torch.float32 and _get_current_dispatch_mode() is None
    with pytest.raises(ValueError, match="precision='half'.*'bfloat16'"):
        with multiply_in('half', 'cpu'):
            pass


# ---- what is rounded once, and what is written out


def make_prior():
    layers = (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3))
    return nn.Sequential(*layers, nn.BatchNorm2d(4)).eval().requires_grad_(False)


def test_inversion_gives_the_same_pixels_as_if_each_product_rounded_its_weights(monkeypatch):
    config = InvertConfig(steps=3, per_class=2)
    config = replace(config, alpha_bn=0.01, plan=((0, 0.5),), plan_after=0.0)
    found = []
    for once in (True, False):
        if not once:
            for name in ('round_weights', 'ready_network'):
                monkeypatch.setattr(inversion, name, lambda given, *more: given)
        torch.manual_seed(0)
        with multiply_in('bfloat16', 'cpu'):
            made = invert(tiny(), tiny_market(2), config, generator(0), Priors(make_prior()))
        found.append(made.images)
    apart = (found[0].int() - found[1].int()).abs()
    assert apart.float().mean() < 1, 'sums of the prior alone have another order'
    assert found[0].float().std() > 20


def test_weights_are_rounded_once_and_only_those_of_products():
    backbone = tiny()
    with multiply_in('bfloat16', 'cpu'):
        low = round_weights(backbone)
        features = [encode(b, normalise(noise(4), backbone)).features for b in (low, backbone)]
    assert torch.equal(*features)
    kept = {k for k, w in low.weights.items() if w.dtype == torch.float32}
    assert {'positional_embedding', 'class_embedding'} <= kept and 'proj' not in kept
    assert all(low.weights[k].ndim == 1 or k == 'positional_embedding' for k in kept)
    assert round_weights(backbone) is backbone


def test_a_device_that_autocast_does_not_know_multiplies_in_float32():
    assert not is_low('meta') and not is_low('cpu')
    with multiply_in('bfloat16', 'cpu'):
        assert is_low('cpu') and not is_low('meta')


def test_a_prior_keeps_its_statistics_and_is_not_changed():
    net = make_prior()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert ready_network(net, 'cpu') is net
    with multiply_in('bfloat16', 'cpu'):
        ready = ready_network(net, 'cpu')
    assert ready[0].weight.dtype == torch.bfloat16 and ready[1].weight.dtype == torch.float32
    assert ready[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize('groups', [1, 3])
def test_the_gradient_of_the_prior_is_that_of_its_formula(groups):
    net = make_prior().double()
    images = torch.randn(6, 3, 9, 9, generator=generator(0)).double().requires_grad_()

    def formula(x):
        "Eq. 2, layer by layer, as written"
        total = 0
        for layer in net:
            if isinstance(layer, nn.BatchNorm2d):
                parts = x.unflatten(0, (groups, -1))
                var, mean = torch.var_mean(parts, dim=(1, 3, 4), correction=0)
                total = total + (mean - layer.running_mean).norm(dim=1)
                total = total + (var - layer.running_var).norm(dim=1)
            x = layer(x)
        return total

    found, wanted = bn_prior(net, images, groups), formula(images)
    torch.testing.assert_close(found, wanted)
    slopes = [torch.autograd.grad(value.sum(), images)[0] for value in (found, wanted)]
    torch.testing.assert_close(*slopes)


@pytest.mark.parametrize('name', ['bfloat16', 'float32'])
@pytest.mark.parametrize('learns', [True, False])
def test_attention_is_written_out_for_gradients_in_bfloat16_alone(name, learns, monkeypatch):
    used = []
    plain = backbones._attend_plainly
    monkeypatch.setattr(backbones, '_attend_plainly', lambda *heads: used.append(1) or plain(*heads))
    q, k, v = torch.randn(3, 2, 2, 40, 16, generator=generator(0, 'attention'))
    weight = torch.randn(2, 2, 40, 16, generator=generator(0, 'weight'))

    def find_gradient(attend):
        given = [x.clone().requires_grad_(learns) for x in (q, k, v)]
        x = attend(*given).float()
        return torch.cat(torch.autograd.grad((x * weight).sum(), given)) if learns else x

    exact = find_gradient(F.scaled_dot_product_attention)
    with multiply_in(name, 'cpu'):
        gap = differ(find_gradient(backbones._attend), exact)
    assert len(used) == (name == 'bfloat16' and learns)
    assert gap < 0.01 and (gap > 1e-4) == (name == 'bfloat16')

"""The ViT against timm's, and what must not change it: padding, recomputation, the place of a sample or of a token."""

from functools import partial

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from mmssl.backbones.blocks import attention_kernel
from mmssl.backbones.vit import ViT, ViTConfig
from modalities.patches import PatchTokenizer

DIM, DEPTH, HEADS = 32, 3, 4


def small_vit(**options):
    """A ViT whose biases, norms and gains matter."""
    vit = ViT(DIM, DEPTH, HEADS, **options)
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return vit


def their_vit(size, qkv_bias, layer_scale):
    theirs = VisionTransformer(
        img_size=size,
        patch_size=4,
        embed_dim=DIM,
        depth=DEPTH,
        num_heads=HEADS,
        qkv_bias=qkv_bias,
        init_values=layer_scale,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        num_classes=0,
        global_pool="",
    )
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return theirs.eval()


@pytest.mark.parametrize("size", [(16, 16), (8, 20)], ids=["square", "wide"])
@pytest.mark.parametrize(("qkv_bias", "layer_scale"), [(True, None), (True, 0.1), (False, None)])
def test_forward_equals_timms(size, qkv_bias, layer_scale):
    theirs = their_vit(size, qkv_bias, layer_scale)
    tokenizer = PatchTokenizer(size, (4, 4), 3, DIM, positions="learned")
    vit = ViT(DIM, DEPTH, HEADS, qkv_bias=qkv_bias, layer_scale=layer_scale).eval()
    state = {name.replace("ls1", "scale1").replace("ls2", "scale2"): t for name, t in theirs.state_dict().items()}
    vit.load_state_dict({name: t for name, t in state.items() if name.startswith(("blocks.", "norm."))})
    tokenizer.load_state_dict(
        {
            "proj.weight": state["patch_embed.proj.weight"].permute(0, 2, 3, 1).flatten(1),
            "proj.bias": state["patch_embed.proj.bias"],
            "positions.table": state["pos_embed"][0, 1:],
        }
    )
    signal = torch.randn(2, 3, *size)
    cls = state["cls_token"][0] + state["pos_embed"][0, :1]  # ours gives the class token no position of its own
    tokens = torch.cat([cls.expand(2, 1, -1), tokenizer.embed(tokenizer.cut(signal))], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(vit(tokens), theirs.forward_features(signal), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kernel", ["sdpa", "naive"])
def test_padding_tokens_change_nothing(kernel):
    vit, tokens = small_vit(), torch.randn(3, 9, DIM)
    lengths = [9, 6, 4]
    pad = torch.arange(9) >= torch.tensor(lengths)[:, None]
    with torch.no_grad(), attention_kernel(kernel):
        padded = vit(tokens, pad)
        other = vit(torch.where(pad[..., None], 100.0, tokens), pad)
        assert torch.equal(padded[~pad], other[~pad])
        for row, length in enumerate(lengths):
            alone = vit(tokens[row : row + 1, :length])
            torch.testing.assert_close(padded[row : row + 1, :length], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_checkpointing_gives_the_same_output_and_gradients_to_the_bit(dtype):
    plain, recomputing = small_vit(drop_path=0.5), small_vit(drop_path=0.5, checkpointing=True)
    recomputing.load_state_dict(plain.state_dict())
    tokens, seeds = torch.randn(6, 5, DIM), torch.arange(6)
    results = []
    for vit in (plain, recomputing):
        leaf = tokens.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = vit(leaf, seeds=seeds)
        loss = out.float().square().mean()
        results.append([loss, *torch.autograd.grad(loss, [leaf, *vit.parameters()])])
    for expected, again in zip(*results, strict=True):
        assert torch.equal(expected, again)


def test_checkpointing_recomputes_in_the_backward_pass_only():
    vit, runs = small_vit(checkpointing=True), []
    vit.blocks[1].register_forward_pre_hook(lambda *_: runs.append(1))
    out = vit(torch.randn(2, 5, DIM, requires_grad=True))
    assert len(runs) == 1
    out.sum().backward()
    assert len(runs) == 2


def test_stochastic_depth_belongs_to_the_sample_not_to_its_place():
    vit, tokens, seeds = small_vit(drop_path=0.5), torch.randn(8, 5, DIM), torch.arange(8) * 977
    order = torch.randperm(8)
    with torch.no_grad():
        out = vit(tokens, seeds=seeds)
        torch.testing.assert_close(vit(tokens[order], seeds=seeds[order]), out[order])
        torch.testing.assert_close(torch.cat([vit(tokens[:3], seeds=seeds[:3]), vit(tokens[3:], seeds=seeds[3:])]), out)
        assert not torch.allclose(vit(tokens, seeds=seeds + 1), out)
        whole = vit.eval()(tokens, seeds=seeds)
        assert not torch.allclose(whole, out)
        torch.testing.assert_close(vit(tokens), whole)


def test_stochastic_depth_grows_linearly_and_each_block_has_its_own_stream():
    vit = ViT(DIM, 5, HEADS, drop_path=0.4)
    assert [block.drop_path for block in vit.blocks] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert [block.stream for block in vit.blocks] == [0, 1, 2, 3, 4]


def test_the_order_of_tokens_means_nothing():
    vit, tokens, order = small_vit(), torch.randn(2, 7, DIM), torch.randperm(7)
    with torch.no_grad():
        torch.testing.assert_close(vit(tokens[:, order]), vit(tokens)[:, order], rtol=1e-5, atol=1e-5)


def test_bf16_autocast_is_close_to_fp32():
    vit, tokens = ViT(DIM, DEPTH, HEADS), torch.randn(4, 9, DIM)
    with torch.no_grad():
        exact = vit(tokens)
        with torch.autocast("cpu", torch.bfloat16):
            rough = vit(tokens).float()
    assert 0 < (rough - exact).abs().mean() < 0.01 * exact.abs().mean()


def test_config_builds_what_it_says_and_refuses_heads_that_do_not_divide():
    vit = ViTConfig(dim=24, depth=2, num_heads=3, mlp_ratio=2.0, qkv_bias=False, layer_scale=1e-5).build()
    assert vit(torch.randn(1, 4, 24)).shape == (1, 4, 24)
    assert vit.blocks[0].mlp.fc1.out_features == 48
    assert vit.blocks[0].attn.qkv.bias is None
    assert vit.blocks[0].scale1.gamma[0].item() == pytest.approx(1e-5)
    with pytest.raises(ValueError, match="does not divide"):
        ViTConfig(dim=24, num_heads=5)

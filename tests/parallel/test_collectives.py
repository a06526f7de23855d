"""What a compiled program sends, read from its HLO: the forms in which it is written, and what sharding makes of it."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlora.parallel.collectives import collectives, totals

HLO = """\
HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%start.1 (p: bf16[1,16,8]) -> (bf16[1,16,8], bf16[1,64,8], u32[]) {
  %p = bf16[1,16,8]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.1 = bf16[1,64,8]{2,1,0:T(8,128)(2,1)} all-gather(%p), channel_id=1, replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={1}, frontend_attributes={chain_id="1"}
  ROOT %begun = (bf16[1,16,8]{2,1,0}, bf16[1,64,8]{2,1,0}, u32[]{:S(2)}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%middle.1 (p: bf16[1,16,8]) -> bf16[1,64,8] {
  %p.1 = bf16[1,16,8]{2,1,0} parameter(0)
  ROOT %all-gather.2 = bf16[1,64,8]{2,1,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=1, replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={1}, frontend_attributes={chain_id="1"}
}

%inner_body (t: (u32[], f32[4,8])) -> (u32[], f32[4,8]) {
  %t = (u32[], f32[4,8]{1,0}) parameter(0)
  %permute = (f32[4,8]{1,0:T(8,128)}, f32[4,8]{1,0:T(8,128)S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%t), channel_id=3, source_target_pairs={{0,1},{1,0}}
  %again = bf16[1,64,8]{2,1,0} fusion(%t), kind=kLoop, calls=%middle.1
  %turn = u32[]{:T(128)} get-tuple-element(%t), index=0
  %two = u32[]{:T(128)} constant(2), metadata={op_name="x"}
  %next = u32[]{:T(128)} add(%turn, %two)
  ROOT %handed = (u32[], f32[4,8]{1,0}) tuple(%next, %permute)
}

%inner_cond (t: (u32[], f32[4,8])) -> pred[] {
  %t.2 = (u32[], f32[4,8]{1,0}) parameter(0)
  %limit = u32[]{:T(128)} constant(4), metadata={op_name="x"}
  %turn.2 = u32[]{:T(128)} get-tuple-element(%t.2), index=0
  ROOT %less = pred[] compare(%turn.2, %limit), direction=LT
}

%body (s: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %s = (s32[], /*index=1*/f32[4,8]{1,0}) parameter(0)
  %begin = (bf16[1,16,8]{2,1,0}, bf16[1,64,8]{2,1,0}, u32[]) fusion(%s), kind=kCustom, calls=%start.1
  %kernel = f32[4,8]{1,0} custom-call(%s), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="x"}, backend_config={"flag_configs":[]}
  %loop = (u32[], f32[4,8]{1,0}) while(%s), condition=%inner_cond, body=%inner_body
  %reduced = (f32[32]{0}, f32[2,8]{1,0}) all-reduce(%s, %s), channel_id=4, replica_groups=[2,4]<=[8], use_global_device_ids=true, to_apply=%add
}

%cond (s: (s32[], f32[4,8])) -> pred[] {
  %s.1 = (s32[], f32[4,8]{1,0}) parameter(0)
  ROOT %less.1 = pred[] fusion(%s.1), kind=kLoop, calls=%compared
}

%compared (s: (s32[], f32[4,8])) -> pred[] {
  %s.2 = (s32[], f32[4,8]{1,0}) parameter(0)
  %layers = s32[] constant(28)
  ROOT %less.2 = pred[] compare(%s.2, %layers), direction=LT
}

%endless (s: s32[]) -> pred[] {
  %s.3 = s32[] parameter(0)
  ROOT %never = pred[] compare(%s.3, %s.3), direction=LT
}

%scattering (s: s32[]) -> s32[] {
  %s.4 = s32[] parameter(0)
  %scattered = f32[2,8]{1,0} reduce-scatter(%s.4), channel_id=5, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, to_apply=%add
}

ENTRY %main.1 (a: f32[4,8]) -> f32[4,8] {
  %a = f32[4,8]{1,0} parameter(0)
  %layers_loop = (s32[], f32[4,8]{1,0}) while(%a), condition=%cond, body=%body
  %known = s32[] while(%a), condition=%endless, body=%scattering, backend_config={"known_trip_count":{"n":"3"},"x":1}
  ROOT %gathered = f32[32]{0} all-gather(%a), channel_id=6, replica_groups=[1,8]<=[8], dimensions={0}
}
"""  # noqa: E501


def test_the_forms_in_which_it_is_written():
    found = {(one.kind, one.times, one.loops): (one.shapes, one.moved) for one in collectives(HLO)}
    assert found == {
        ("all-gather", 28, 1): (
            ((1, 64, 8),),
            3 / 4 * 64 * 8 * 2,
        ),  # once a layer, not where it is waited for
        ("collective-permute", 28 * 4 // 2, 2): (((4, 8),), 4 * 8 * 4),
        ("all-reduce", 28, 1): (((32,), (2, 8)), 2 * 3 / 4 * (32 + 16) * 4),
        ("reduce-scatter", 3, 1): (((2, 8),), 3 / 4 * 4 * 2 * 8 * 4),
        ("all-gather", 1, 0): (((32,),), 7 / 8 * 32 * 4),
    }
    sent = totals(collectives(HLO))
    assert sent["all-gather"] == 28 * 768 + 112
    assert list(sent) == sorted(sent, key=lambda kind: -sent[kind])


def test_a_loop_whose_end_depends_on_data_counts_once():
    endless = HLO.replace(', backend_config={"known_trip_count":{"n":"3"},"x":1}', "")
    (scattered,) = (one for one in collectives(endless) if one.kind == "reduce-scatter")
    assert scattered.times == 1


@pytest.mark.parametrize("devices", [2, 8])
def test_what_xla_writes(devices):
    """A product whose sum is spread over devices, in a scan: one all-reduce of the result for each turn."""
    mesh = Mesh(jax.devices()[:devices], ("x",))

    def step(carry, kernel):
        return carry + jax.lax.with_sharding_constraint(carry @ kernel, NamedSharding(mesh, P())), None

    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=NamedSharding(mesh, P(None, "x")))
    kernels = jax.ShapeDtypeStruct((5, 64, 64), jnp.float32, sharding=NamedSharding(mesh, P(None, "x", None)))
    compiled = jax.jit(lambda x, k: jax.lax.scan(step, x, k)[0]).lower(x, kernels).compile()
    (reduced,) = (one for one in collectives(compiled.as_text()) if one.kind == "all-reduce")
    assert (reduced.times, reduced.loops, reduced.shapes) == (5, 1, ((16, 64),))
    assert reduced.moved == 2 * (devices - 1) / devices * 16 * 64 * 4

"""GPU time of a step by kind of kernel, from a list of kernels."""

import pytest

from pipeline.step_profile import kind_of, summarise


def test_busy_time_counts_overlapping_kernels_once_and_leaves_out_gaps():
    profile = summarise([("nvjet_tst_128x256", 0, 10), ("scan_forward_bf16", 5, 20), ("elementwise_kernel", 30, 34)])
    assert profile.busy_s == pytest.approx(24e-6)
    assert profile.kernels == 3
    assert profile.seconds_by_kind == pytest.approx({"scan": 15e-6, "matmul": 10e-6, "elementwise": 4e-6})


def test_a_kernel_inside_a_longer_kernel_adds_no_busy_time():
    assert summarise([("nvjet", 0, 100), ("Memcpy DtoD", 10, 20), ("nvjet", 90, 110)]).busy_s == pytest.approx(110e-6)


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_sm90_tst_256x128_64x4_2x1_v_bz_coopA_NTN", "matmul"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "matmul"),
        ("_chunk_scan_fwd_kernel", "scan"),
        ("_chunk_state_bwd_db_kernel", "scan"),
        ("void selective_scan_bwd_kernel<Selective_Scan_bwd_kernel_traits<32, 16, true>>", "scan"),
        ("scan_backward_bf16", "scan"),
        ("void causal_conv1d_channellast_bwd_kernel<...>", "conv1d"),
        ("_layer_norm_bwd_kernel", "norm"),
        ("pytorch_flash::flash_fwd_kernel", "attention"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("ncclDevKernel_AllGather_RING_LL", "communication"),
        ("void at::native::vectorized_elementwise_kernel<4, gelu>", "elementwise"),
    ],
)
def test_kernels_of_a_training_step_are_assigned_to_their_kind(kernel, kind):
    assert kind_of(kernel) == kind

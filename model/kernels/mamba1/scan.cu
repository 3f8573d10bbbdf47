// Selective scan of Mamba-1 with channels last, forward and backward, for 16 states per channel.
//
//   h[t] = exp(delta[t] A) h[t-1] + delta[t] x[t] B[t],   out[t] = (C[t] h[t] + D x[t]) silu(z[t]),
//
// with delta = softplus(dt + dt_bias). x, dt, z and out are [b, l, c]; B and C are [b, l, 16]; A is [c, 16].
//
// A block computes THREADS channels of one sequence, position by position. Four lanes of a warp (a quad) share four
// channels: each lane holds the states 4q to 4q + 3 of all four channels, where q is the position of the lane in its
// quad. For elementwise work, a lane owns one channel, whose index in the block is the index of the thread.
//
// Sums over states or channels are transposed reductions: in each exchange between two lanes, a lane keeps one half of
// its values and sends the other half. Eight sums over eight quads then need 7 shuffles instead of 24.
//
// The forward pass stores the state at the start of every chunk of PARTS * UNROLL positions. The backward pass visits
// the chunks from the last to the first. It recomputes the states at the starts of the chunk's parts into shared
// memory. Then it recomputes the states of a part in registers, and goes through the positions of the part from the
// last to the first.

#define FULL 0xffffffffu
#define STATES 16
#define THREADS 128 // same value in scan.py, like PARTS * UNROLL
#define GROUP 4     // number of positions that the forward pass loads ahead
#define UNROLL 4
#define PARTS 8
#define CHUNK (UNROLL * PARTS)
#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f

typedef long long i64;

struct bf16 {
  unsigned short bits;
};

// Loads through the read-only path, which the compiler may move across stores.
__device__ __forceinline__ float load(const bf16 *at) { return __uint_as_float((unsigned)__ldg(&at->bits) << 16); }
__device__ __forceinline__ float load(const float *at) { return __ldg(at); }

__device__ __forceinline__ void store(bf16 *at, float v) {
  unsigned short bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(v));
  at->bits = bits;
}
__device__ __forceinline__ void store(float *at, float v) { *at = v; }

__device__ __forceinline__ void load4(const bf16 *at, float (&v)[4]) {
  uint2 bits = __ldg((const uint2 *)at);
  v[0] = __uint_as_float(bits.x << 16), v[1] = __uint_as_float(bits.x & 0xffff0000u);
  v[2] = __uint_as_float(bits.y << 16), v[3] = __uint_as_float(bits.y & 0xffff0000u);
}
__device__ __forceinline__ void load4(const float *at, float (&v)[4]) {
  float4 f = __ldg((const float4 *)at);
  v[0] = f.x, v[1] = f.y, v[2] = f.z, v[3] = f.w;
}
__device__ __forceinline__ void store4(float *at, const float (&v)[4]) {
  *(float4 *)at = make_float4(v[0], v[1], v[2], v[3]);
}

__device__ __forceinline__ void recall(const float4 &f, float (&v)[4]) {
  v[0] = f.x, v[1] = f.y, v[2] = f.z, v[3] = f.w;
}

__device__ __forceinline__ float exp2_fast(float v) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
__device__ __forceinline__ float log2_fast(float v) {
  float r;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
// log(1 + e^v) without branches. Where e^-|v| is small, a series is used, because 1 + e^-|v| would round it away.
__device__ __forceinline__ float softplus(float v) {
  float e = exp2_fast(-LOG2E * fabsf(v)), log = LN2 * log2_fast(1.f + e);
  float series = e * (1.f - e * (0.5f - e * (1.f / 3.f - e * (0.25f - e * 0.2f))));
  return fmaxf(v, 0.f) + (e < 0.05f ? series : log);
}
__device__ __forceinline__ float sigmoid(float v) { return __fdividef(1.f, 1.f + exp2_fast(-LOG2E * v)); }

// Value of v in lane i of the same quad.
__device__ __forceinline__ float of_quad(float v, int i) { return __shfl_sync(FULL, v, i, 4); }

// Sum v over the quad, and return the sum for the lane's own channel.
__device__ __forceinline__ float sum_states(const float (&v)[4], int q) {
  bool high = q & 2, odd = q & 1;
  float k0 = high ? v[2] : v[0], k1 = high ? v[3] : v[1];
  k0 += __shfl_xor_sync(FULL, high ? v[0] : v[2], 2);
  k1 += __shfl_xor_sync(FULL, high ? v[1] : v[3], 2);
  return (odd ? k1 : k0) + __shfl_xor_sync(FULL, odd ? k0 : k1, 1);
}

// Sum v over the eight quads. Each lane returns one of the eight sums, with the index that `index_of_sum` returns.
__device__ __forceinline__ float sum_channels(const float (&v)[8], int lane) {
  bool a = lane & 16, b = lane & 8, c = lane & 4;
  float k[4], m[2];
#pragma unroll
  for (int j = 0; j < 4; ++j)
    k[j] = (a ? v[4 + j] : v[j]) + __shfl_xor_sync(FULL, a ? v[j] : v[4 + j], 16);
#pragma unroll
  for (int j = 0; j < 2; ++j)
    m[j] = (b ? k[2 + j] : k[j]) + __shfl_xor_sync(FULL, b ? k[j] : k[2 + j], 8);
  return (c ? m[1] : m[0]) + __shfl_xor_sync(FULL, c ? m[0] : m[1], 4);
}
// Position in a row [B: 16, C: 16] of the sum that `sum_channels` returns, for v = {dB[4], dC[4]}.
__device__ __forceinline__ int index_of_sum(int lane) {
  return (lane & 16 ? 16 : 0) + 4 * (lane & 3) + (lane & 8 ? 2 : 0) + (lane & 4 ? 1 : 0);
}

template <bool VALUE> struct Bool {
  static constexpr bool value = VALUE;
};

template <class T> struct Inputs {
  const T *x, *dt, *z, *B, *C;
  i64 x_row, x_batch, dt_row, dt_batch, z_row, z_batch, bc_row, bc_batch; // strides in elements
  const float *A, *D, *dt_bias;
  int length, channels;
};

// One step of the recurrence for the four channels of a quad. d and u are delta and delta * x of the lane's own
// channel.
__device__ __forceinline__ void advance(float (&h)[4][4], const float (&a2)[4][4], const float (&B)[4], float d,
                                        float u) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float di = of_quad(d, i), ui = of_quad(u, i);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      h[i][j] = exp2_fast(di * a2[i][j]) * h[i][j] + ui * B[j];
  }
}

template <class T>
__device__ __forceinline__ void load_decay(const Inputs<T> &in, int first, int n0, float (&a2)[4][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    load4(in.A + (i64)(first + i) * STATES + n0, a2[i]);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      a2[i][j] *= LOG2E;
  }
}

__device__ __forceinline__ void store_states(float *at, const float (&h)[4][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
    store4(at + i * STATES, h[i]);
}

template <class T>
__device__ __forceinline__ void forward_scan(const Inputs<T> &in, T *out, float *states, float *last_state) {
  int lane = threadIdx.x & 31, q = lane & 3, n0 = 4 * q, b = blockIdx.y;
  int channel = blockIdx.x * THREADS + threadIdx.x, first = channel & ~3;
  float a2[4][4], h[4][4] = {};
  load_decay(in, first, n0, a2);
  float skip = in.D[channel], bias = in.dt_bias[channel];
  const T *x = in.x + b * in.x_batch + channel, *dt = in.dt + b * in.dt_batch + channel;
  const T *z = in.z + b * in.z_batch + channel, *B = in.B + b * in.bc_batch + n0, *C = in.C + b * in.bc_batch + n0;
  out += (i64)b * in.length * in.channels + channel;
  int chunks = (in.length + CHUNK - 1) / CHUNK;
  // The inputs of the next GROUP positions are loaded while the current positions are computed.
  float xs[GROUP], dts[GROUP], zs[GROUP], Bs[GROUP][4], Cs[GROUP][4];
  int x_row = in.x_row, dt_row = in.dt_row, z_row = in.z_row, bc_row = in.bc_row;
  auto fetch = [&](int start) {
    i64 t = min(start, in.length - 1);
    const T *xt = x + t * in.x_row, *dtt = dt + t * in.dt_row, *zt = z + t * in.z_row;
    const T *Bt = B + t * in.bc_row, *Ct = C + t * in.bc_row;
#pragma unroll
    for (int u = 0; u < GROUP; ++u) {
      int k = min(u, in.length - 1 - (int)t);
      xs[u] = load(xt + k * x_row), dts[u] = load(dtt + k * dt_row), zs[u] = load(zt + k * z_row);
      load4(Bt + k * bc_row, Bs[u]), load4(Ct + k * bc_row, Cs[u]);
    }
  };
  fetch(0);
  for (int start = 0; start < in.length; start += GROUP) {
    float delta[GROUP], xt[GROUP], zt[GROUP], Bt[GROUP][4], Ct[GROUP][4];
#pragma unroll
    for (int u = 0; u < GROUP; ++u) {
      bool inside = start + u < in.length; // positions after the end leave the state unchanged, as delta and x are 0
      delta[u] = inside ? softplus(dts[u] + bias) : 0.f, xt[u] = inside ? xs[u] : 0.f, zt[u] = zs[u];
#pragma unroll
      for (int j = 0; j < 4; ++j)
        Bt[u][j] = Bs[u][j], Ct[u][j] = Cs[u][j];
    }
    fetch(start + GROUP);
#pragma unroll
    for (int u = 0; u < GROUP; ++u) {
      float y[4];
      advance(h, a2, Bt[u], delta[u], delta[u] * xt[u]);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        y[i] = h[i][0] * Ct[u][0] + h[i][1] * Ct[u][1] + h[i][2] * Ct[u][2] + h[i][3] * Ct[u][3];
      float gated = (sum_states(y, q) + skip * xt[u]) * zt[u] * sigmoid(zt[u]);
      if (start + u < in.length)
        store(out + (i64)(start + u) * in.channels, gated);
    }
    int end = start + GROUP;
    if (states && end % CHUNK == 0 && end < in.length) {
      store_states(states + ((i64)(b * (chunks - 1) + end / CHUNK - 1) * in.channels + first) * STATES + n0, h);
    }
  }
  if (last_state)
    store_states(last_state + ((i64)b * in.channels + first) * STATES + n0, h);
}

template <class T>
__device__ __forceinline__ void backward_scan(const Inputs<T> &in, const T *dout, const float *states, T *out, T *dx,
                                              T *ddt, T *dz, i64 dz_row, float *dbc, float *dA, float *dD,
                                              float *dbias) {
  extern __shared__ float4 memory[]; // states [PARTS][4][THREADS], then sums of dB and dC [2][UNROLL][WARPS][32]
  float *sums = (float *)(memory + PARTS * 4 * THREADS);
  constexpr int WARPS = THREADS / 32;
  int lane = threadIdx.x & 31, warp = threadIdx.x / 32, q = lane & 3, n0 = 4 * q, b = blockIdx.y;
  int channel = blockIdx.x * THREADS + threadIdx.x, first = channel & ~3, at_sum = index_of_sum(lane);
  float a2[4][4], h[4][4], dh[4][4] = {}, grad_A[4][4] = {}, grad_D = 0.f, grad_bias = 0.f;
  load_decay(in, first, n0, a2);
  float skip = in.D[channel], bias = in.dt_bias[channel];
  const T *x = in.x + b * in.x_batch + channel, *dt = in.dt + b * in.dt_batch + channel;
  const T *z = in.z + b * in.z_batch + channel, *B = in.B + b * in.bc_batch + n0, *C = in.C + b * in.bc_batch + n0;
  i64 base = (i64)b * in.length;
  dout += base * in.channels + channel, out += base * in.channels + channel, dx += base * in.channels + channel;
  ddt += base * in.channels + channel, dz += base * dz_row + channel;
  dbc += ((i64)blockIdx.x * gridDim.y + b) * in.length * 32;
  int chunks = (in.length + CHUNK - 1) / CHUNK, buffer = 0;
  int x_row = in.x_row, dt_row = in.dt_row, z_row = in.z_row, bc_row = in.bc_row, dz_step = dz_row;
  for (int k = chunks - 1; k >= 0; --k) {
    int start = k * CHUNK, parts = (min(CHUNK, in.length - start) + UNROLL - 1) / UNROLL;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (k)
        load4(states + ((i64)(b * (chunks - 1) + k - 1) * in.channels + first + i) * STATES + n0, h[i]);
      else
        h[i][0] = h[i][1] = h[i][2] = h[i][3] = 0.f;
    }
    // Recompute the state at the start of each part.
    for (int s = 0; s < parts; ++s) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        memory[(s * 4 + i) * THREADS + threadIdx.x] = make_float4(h[i][0], h[i][1], h[i][2], h[i][3]);
      if (s + 1 < parts) {
        i64 t = start + s * UNROLL;
        const T *xt = x + t * in.x_row, *dtt = dt + t * in.dt_row, *Bt = B + t * in.bc_row;
        float xs[UNROLL], delta[UNROLL], Bs[UNROLL][4];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u)
          xs[u] = load(xt + u * x_row), delta[u] = load(dtt + u * dt_row), load4(Bt + u * bc_row, Bs[u]);
#pragma unroll
        for (int u = 0; u < UNROLL; ++u)
          delta[u] = softplus(delta[u] + bias);
#pragma unroll
        for (int u = 0; u < UNROLL; ++u)
          advance(h, a2, Bs[u], delta[u], delta[u] * xs[u]);
      }
    }
    auto part = [&](int s, auto whole) {
      constexpr bool WHOLE = decltype(whole)::value; // whether all positions of the part are inside the sequence
      i64 t = start + s * UNROLL;
      int last = in.length - 1 - (int)t; // positions after the end repeat the last position with delta = x = dout = 0
      const T *xt = x + t * in.x_row, *dtt = dt + t * in.dt_row, *Bt = B + t * in.bc_row, *Ct = C + t * in.bc_row;
      const T *zt = z + t * in.z_row, *gt = dout + t * in.channels;
      T *out_t = out + t * in.channels, *dx_t = dx + t * in.channels, *ddt_t = ddt + t * in.channels,
        *dz_t = dz + t * dz_row;
      float hs[UNROLL][4][4], xs[UNROLL], deltas[UNROLL], dys[UNROLL], zs[UNROLL], Bs[UNROLL][4], Cs[UNROLL][4];
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) {
        int k = WHOLE ? u : min(u, last);
        xs[u] = load(xt + k * x_row), deltas[u] = load(dtt + k * dt_row), zs[u] = load(zt + k * z_row);
        dys[u] = load(gt + k * in.channels), load4(Bt + k * bc_row, Bs[u]), load4(Ct + k * bc_row, Cs[u]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
        recall(memory[(s * 4 + i) * THREADS + threadIdx.x], h[i]);
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) {
        bool inside = WHOLE || u <= last;
        deltas[u] = inside ? softplus(deltas[u] + bias) : 0.f;
        xs[u] = inside ? xs[u] : 0.f, dys[u] = inside ? dys[u] : 0.f;
        advance(h, a2, Bs[u], deltas[u], deltas[u] * xs[u]);
        float y[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          y[i] = h[i][0] * Cs[u][0] + h[i][1] * Cs[u][1] + h[i][2] * Cs[u][2] + h[i][3] * Cs[u][3];
#pragma unroll
          for (int j = 0; j < 4; ++j)
            hs[u][i][j] = h[i][j];
        }
        float own = sum_states(y, q) + skip * xs[u], sig = sigmoid(zs[u]), gate = zs[u] * sig;
        if (inside)
          store(out_t + u * in.channels, own * gate),
              store(dz_t + u * dz_step, dys[u] * own * (sig + gate * (1.f - sig)));
        dys[u] *= gate;
      }
#pragma unroll
      for (int u = UNROLL - 1; u >= 0; --u) {
        float before[4][4], S1[4], S2[4], dBC[8] = {};
        float own_u = deltas[u] * xs[u];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (u) {
#pragma unroll
            for (int j = 0; j < 4; ++j)
              before[i][j] = hs[u ? u - 1 : 0][i][j];
          } else
            recall(memory[(s * 4 + i) * THREADS + threadIdx.x], before[i]);
          float di = of_quad(deltas[u], i), ui = of_quad(own_u, i), dyi = of_quad(dys[u], i);
          S1[i] = S2[i] = 0.f;
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            float grad = dh[i][j] + dyi * Cs[u][j], decay = exp2_fast(di * a2[i][j]);
            dBC[4 + j] += dyi * hs[u][i][j];
            dBC[j] += grad * ui;
            S1[i] += grad * Bs[u][j];
            grad *= decay;
            float through = grad * before[i][j];
            S2[i] += through * a2[i][j];
            grad_A[i][j] += through * di;
            dh[i][j] = grad;
          }
        }
        float s1 = sum_states(S1, q), s2 = sum_states(S2, q) * LN2;
        float grad_dt = (s1 * xs[u] + s2) * (1.f - exp2_fast(-LOG2E * deltas[u]));
        grad_D += dys[u] * xs[u], grad_bias += grad_dt;
        if (WHOLE || u <= last)
          store(dx_t + u * in.channels, s1 * deltas[u] + skip * dys[u]), store(ddt_t + u * in.channels, grad_dt);
        sums[((buffer * UNROLL + u) * WARPS + warp) * 32 + at_sum] = sum_channels(dBC, lane);
      }
      __syncthreads();
      for (int i = threadIdx.x; i < UNROLL * 32; i += THREADS) {
        const float *at = sums + ((buffer * UNROLL + i / 32) * WARPS) * 32 + i % 32;
        float total = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w)
          total += at[w * 32];
        if (WHOLE || i / 32 <= last)
          dbc[t * 32 + i] = total;
      }
      buffer ^= 1;
    };
    for (int s = parts - 1; s >= 0; --s) {
      if (start + (s + 1) * UNROLL <= in.length)
        part(s, Bool<true>());
      else
        part(s, Bool<false>());
    }
  }
  store_states(dA + ((i64)b * in.channels + first) * STATES + n0, grad_A);
  dD[(i64)b * in.channels + channel] = grad_D, dbias[(i64)b * in.channels + channel] = grad_bias;
}

#define KERNELS(T, SUFFIX)                                                                                             \
  extern "C" __global__ void __launch_bounds__(THREADS, 3)                                                             \
      scan_forward_##SUFFIX(Inputs<T> in, T *out, float *states, float *last_state) {                                  \
    forward_scan<T>(in, out, states, last_state);                                                                      \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                             \
      scan_backward_##SUFFIX(Inputs<T> in, const T *dout, const float *states, T *out, T *dx, T *ddt, T *dz,           \
                             i64 dz_row, float *dbc, float *dA, float *dD, float *dbias) {                             \
    backward_scan<T>(in, dout, states, out, dx, ddt, dz, dz_row, dbc, dA, dD, dbias);                                  \
  }
KERNELS(bf16, bf16)
KERNELS(float, fp32)

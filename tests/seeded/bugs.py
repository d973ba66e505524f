"""Bugs that the tests have to find, each a change of a file; run.py tries them. An old text stands once in its file."""

from typing import NamedTuple


class Bug(NamedTuple):
    name: str
    breaks: str
    old: str
    new: str
    likely: str  # pytest's arguments that should find it; what comes after runs only where they do not


def of_op(op: str, more: str = "") -> str:
    return f"tests/ops/test_contract.py::test_against_float64 tests/ops/test_{op}.py{more} -k {op}"


CPU = {
    "csrc/euler_step/cpu.cpp": [
        Bug(
            "low tail",
            "the last element of a low-precision copy whose length is no multiple of a vector",
            "if (low) memcpy(static_cast<void*>(low + i), ls, rest * sizeof(Low));",
            "if (low) memcpy(static_cast<void*>(low + i), ls, (rest - 1) * sizeof(Low));",
            of_op("euler_step"),
        ),
        Bug(
            "guidance base",
            "guidance of weight w + 1",
            "vel = base + w * (vel - base);",
            "vel = vel + w * (vel - base);",
            of_op("euler_step"),
        ),
    ],
    "csrc/linear_update/cpu.cpp": [
        Bug(
            "factor in tail",
            "a factor of a float64 state rounded to float32 in the last few elements",
            "sum += X(a.b[t]) * load(v);",
            "sum += X(float(a.b[t])) * load(v);",
            of_op("linear_update"),
        ),
        Bug(
            "scale of the tail",
            "the state's factor in the last few elements",
            "auto sum = rounded(X(a.scale) * load(x));",
            "auto sum = load(x);",
            of_op("linear_update"),
        ),
        Bug(
            "second thread",
            "64 elements at the begin of the second thread's part",
            "int64_t i = lines * p / parts * 64, end",
            "int64_t i = lines * p / parts * 64 + (p ? 64 : 0), end",
            of_op("linear_update"),
        ),
    ],
    "csrc/bellman/cpu.cpp": [
        Bug(
            "ties in vectors",
            "of equal costs the larger knot",
            "const vi better = sum < best;",
            "const vi better = sum <= best;",
            of_op("bellman"),
        ),
        Bug(
            "carry of the second step",
            "the factor on the cost so far, in the second step",
            "const double base = a.carry * last[j];",
            "const double base = (s > 2 ? a.carry : 1) * last[j];",
            of_op("bellman"),
        ),
    ],
    "csrc/bellman_pairs/cpu.cpp": [
        Bug(
            "-Inf",
            "costs of -Inf are not refused",
            "numbers &= (c[r] > -inf) | unread;",
            "numbers &= (c[r] >= -inf) | unread;",
            of_op("bellman_pairs"),
        ),
        Bug(
            "ties",
            "of equal costs the larger knot",
            "const vi better = sum < least;",
            "const vi better = sum <= least;",
            of_op("bellman_pairs"),
        ),
    ],
    "csrc/segment_points/cpu.cpp": [
        Bug(
            "last interval",
            "an interval behind the last one is read instead of refused",
            "g.interval[r] > g.knots - 2",
            "g.interval[r] > g.knots - 1",
            of_op("segment_points", " tests/ops/test_ranges.py"),
        ),
        Bug(
            "tail",
            "the last few elements are x_a whatever u",
            "memcpy(bs, b + i, rest * sizeof(X));",
            "memcpy(bs, a + i, rest * sizeof(X));",
            of_op("segment_points"),
        ),
    ],
    "csrc/cost_from_gram/cpu.cpp": [
        Bug(
            "NaN",
            "a NaN of the Gram matrix is a cost of zero",
            "cost[k] = c < 0 ? 0 : c;",
            "cost[k] = c > 0 ? c : 0;",
            of_op("cost_from_gram"),
        ),
        Bug(
            "mixed term",
            "costs from states that are not Euler's",
            "SS + 2 * span * Se",
            "SS + span * Se",
            of_op("cost_from_gram"),
        ),
    ],
    "csrc/straighten_loss/cpu.cpp": [
        Bug(
            "undrawn interval",
            "the loss of an interval that was not drawn is 0, not NaN",
            "per_interval[i] /= double(count);",
            "per_interval[i] /= count ? double(count) : 1.0;",
            of_op("straighten_loss"),
        ),
        Bug(
            "Huber's parts",
            "a gradient of pseudo-Huber at the begin of a long sample's later parts",
            "const int64_t begin = i % blocks * kBlock;",
            "const int64_t begin = i % blocks * kBlock + (i % blocks ? 1 : 0);",
            of_op("straighten_loss"),
        ),
    ],
    "csrc/velocity_gram/cpu.cpp": [
        Bug(
            "stale columns",
            "what a longer chunk left in the tile joins the sums of a shorter one, of secants",
            "for (int64_t r = 0; r < 2 * g.K - 1; r++)\n    for (int64_t c = n;",
            "for (int64_t r = g.K - 1; r < 2 * g.K - 1; r++)\n    for (int64_t c = n;",
            of_op("velocity_gram"),
        ),
    ],
    "csrc/linear_euler/cpu.cpp": [
        Bug(
            "variance's tail",
            "LayerNorm of features that are no whole vectors",
            "for (int64_t i = rest; i < L; i++) last[i] = 0;",
            "for (int64_t i = rest; i < L - 1; i++) last[i] = 0;",
            of_op("linear_euler"),
        ),
        Bug(
            "another sample's modulation",
            "tokens of a tile that are of several samples, as both halves of a guided one",
            "if (of.sample != token[0].sample) {",
            "if (of.sample < 0) {",
            of_op("linear_euler"),
        ),
    ],
    "csrc/linear_euler/run.h": [
        Bug(
            "transposed patches",
            "rows and columns of a patch",
            "(c * P + pq / P) * run + pq % P",
            "(c * P + pq % P) * run + pq / P",
            of_op("linear_euler"),
        ),
        Bug(
            "read past the row",
            "tokens are read where they lie, up to a whole vector",
            "is_plain(a) && columns == a.d;",
            "is_plain(a);",
            of_op("linear_euler"),
        ),
    ],
    "csrc/mlp_sample/panels.h": [
        Bug(
            "a group of five",
            "samples that are multiplied five at a time",
            "case 5: return product<D, 5, V, 1>;",
            "case 5: return product<D, 4, V, 1>;",
            of_op("mlp_sample"),
        ),
    ],
    "csrc/mlp_sample/run.h": [
        Bug(
            "gain",
            "SELU's gain, after a layer with a bias and nothing else",
            "l.shift_each < 0 && l.gain == 1 &&",
            "l.shift_each < 0 &&",
            of_op("mlp_sample"),
        ),
    ],
}

CUDA = {
    "csrc/euler_step/cuda.cu": [
        Bug(
            "unaligned rest",
            "elements behind the last word of a state that begins between words",
            "const int64_t at = i < head ? i : i + vectors * E;",
            "const int64_t at = i < head ? i : i - head + vectors * E;",
            of_op("euler_step"),
        ),
        Bug(
            "guidance base",
            "guidance of weight w + 1",
            "return state + h * (u + w * (c - u));",
            "return state + h * (c + w * (c - u));",
            of_op("euler_step"),
        ),
    ],
    "csrc/linear_update/cuda.cu": [
        Bug(
            "third term",
            "the last of 3, 7, 11.. terms",
            "case 3: add_terms<3>(sum",
            "case 3: add_terms<2>(sum",
            of_op("linear_update"),
        ),
        Bug(
            "many terms",
            "the first 16 of more terms",
            "first += kTerms, x = out)",
            "first += kTerms)",
            of_op("linear_update"),
        ),
    ],
    "csrc/segment_points/cuda.cu": [
        Bug(
            "last interval",
            "an interval behind the last one makes no NaN",
            "in_bank(i, s, knots, samples)",
            "in_bank(i, s, knots + 1, samples)",
            of_op("segment_points", " tests/ops/test_ranges.py"),
        ),
    ],
    "csrc/cost_from_gram/cuda.cu": [
        Bug(
            "prefix sum",
            "columns of a lane that is a power of two",
            "if (lane >= d) run = joined(other, run);",
            "if (lane > d) run = joined(other, run);",
            of_op("cost_from_gram"),
        ),
        Bug(
            "race",
            "a barrier between reads of sums and writes of steps in the same memory",
            "    __syncthreads();\n    double* own = steps",
            "    double* own = steps",
            "tests/test_host_cuda.py -k cost_from_gram",
        ),
    ],
    "csrc/bellman/cuda.cu": [
        Bug(
            "ties between threads",
            "of equal costs any knot",
            "if (sum < best.sum || (sum == best.sum && knot < best.knot))",
            "if (sum < best.sum || (sum == best.sum && knot > best.knot))",
            of_op("bellman"),
        ),
        Bug(
            "own columns",
            "with more than 128 knots, knots that are in the block's own columns",
            "j < first + kColumns - 1; j +=",
            "j < first; j +=",
            of_op("bellman"),
        ),
    ],
    "csrc/bellman_pairs/cuda.cu": [
        Bug(
            "first knot",
            "the first knot that a step can come from",
            "each_cost(s == 2 ? 0 : s - 2,",
            "each_cost(s == 2 ? 0 : s - 1,",
            of_op("bellman_pairs"),
        ),
        Bug(
            "ties between warps",
            "with more than 32 knots, of equal costs any knot",
            "if (sum < best || (sum == best && knot < from))",
            "if (sum < best || (sum == best && knot > from))",
            of_op("bellman_pairs"),
        ),
    ],
    "csrc/straighten_loss/cuda.cu": [
        Bug(
            "means of chunks",
            "the mean of an interval of more than 1,024 samples",
            "count += from[1];",
            "count += 1;",
            of_op("straighten_loss"),
        ),
        Bug(
            "gradient of nowhere",
            "rows that are nowhere in the bank keep what memory held",
            "refuse_row<E, X>(gradient, begin, end);",
            "refuse_row<E, X>(gradient, begin, begin);",
            of_op("straighten_loss", " tests/ops/test_ranges.py"),
        ),
    ],
    "csrc/velocity_gram/cuda.cu": [
        Bug(
            "lowered scale",
            "sums so far when a larger increment comes",
            "ratio[r] = s * inverse(before);",
            "ratio[r] = 1;",
            of_op("velocity_gram"),
        ),
        Bug(
            "lo hi",
            "on the diagonal, products of the lower half with the upper",
            "add(a, low[i]), add(a, a[i]), add(low, a[i]);",
            "add(a, low[i]), add(a, a[i]);",
            of_op("velocity_gram"),
        ),
    ],
    "csrc/linear_euler/cuda.cu": [
        Bug(
            "scale before a long history",
            "the state's factor is applied twice beside more than 16 terms",
            "a.x = a.out, a.x_scale = 1;",
            "a.x = a.out;",
            of_op("linear_euler"),
        ),
        Bug(
            "padding in the variance",
            "LayerNorm of features that are no multiple of 16",
            "const float e = i + j < d ? convert<float>(z[j]) - mean : 0;\n            square += e * e;",
            "const float e = convert<float>(z[j]) - mean;\n            square += e * e;",
            of_op("linear_euler"),
        ),
        Bug(
            "third part",
            "products of parts of 2^-16",
            "for (int order = AP + BP - 2 < 2 ? AP + BP - 2 : 2; order >= 0; order--)",
            "for (int order = AP + BP - 2 < 1 ? AP + BP - 2 : 1; order >= 0; order--)",
            of_op("linear_euler"),
        ),
    ],
    "csrc/mlp_sample/cuda.cu": [
        Bug(
            "unconditional rows",
            "the order of the two networks of guidance",
            "const Layer& l = a.program.layers[pass * a.layers + i];",
            "const Layer& l = a.program.layers[(a.guided - pass) * a.layers + i];",
            of_op("mlp_sample"),
        ),
        Bug(
            "odd input",
            "bfloat16 weights: the last input of an odd number",
            "convert<bf16>(at.c * 2 < l.in_width ? from[0] : 0.0f)",
            "convert<bf16>(at.c * 2 + 1 < l.in_width ? from[0] : 0.0f)",
            of_op("mlp_sample"),
        ),
    ],
}

TRITON = {
    "flowkernels/ops/euler_step/triton_kernel.py": [
        Bug(
            "guidance base",
            "guidance of weight w + 1",
            "velocity = base + scalar(guidance, dtype)",
            "velocity = velocity + scalar(guidance, dtype)",
            of_op("euler_step"),
        ),
    ],
    "flowkernels/ops/linear_update/triton_kernel.py": [
        Bug("many terms", "the first 8 of more terms", "to if first else x", "x", of_op("linear_update")),
        Bug(
            "scale of every launch",
            "the state's factor is applied once for each 8 terms",
            "of_state = None if first else scale",
            "of_state = scale",
            of_op("linear_update"),
        ),
    ],
    "flowkernels/ops/segment_points/triton_kernel.py": [
        Bug(
            "last interval",
            "an interval behind the last one makes no NaN",
            "(i < knots - 1)",
            "(i < knots)",
            of_op("segment_points", " tests/ops/test_ranges.py"),
        ),
    ],
    "flowkernels/ops/cost_from_gram/triton_kernel.py": [
        Bug(
            "own increment twice",
            "the sum over the increments before k",
            "mask=(m < k) & has_a",
            "mask=(m <= k) & has_a",
            of_op("cost_from_gram"),
        ),
    ],
    "flowkernels/ops/bellman/triton_kernel.py": [
        Bug(
            "ties between blocks",
            "with more than 64 knots, of equal costs the larger knot",
            "best_j = tl.where(least < best, least_j, best_j)",
            "best_j = tl.where(least <= best, least_j, best_j)",
            of_op("bellman"),
        ),
        Bug(
            "parents of nothing",
            "a knot that is not reached has a parent",
            'best_j = tl.where(best < float("inf"), best_j, -1)',
            'best_j = tl.where(best <= float("inf"), best_j, -1)',
            of_op("bellman"),
        ),
    ],
    "flowkernels/ops/bellman_pairs/triton_kernel.py": [
        Bug(
            "first knot",
            "the first knot that a step can come from",
            "(s - 2, n)",
            "(s - 1, n)",
            of_op("bellman_pairs"),
        ),
    ],
    "flowkernels/ops/straighten_loss/triton_kernel.py": [
        Bug(
            "Huber's gradient",
            "a gradient of pseudo-Huber of short samples",
            "_divide(share, loss + c), 2 * share)",
            "_divide(share, loss), 2 * share)",
            of_op("straighten_loss"),
        ),
        Bug(
            "weights of the mean",
            "the weighted mean over all samples",
            "x *= tl.load(weight + row, mask=mine, other=0)",
            "x *= tl.load(weight + own, mask=mine, other=0)",
            of_op("straighten_loss"),
        ),
    ],
    "flowkernels/ops/velocity_gram/triton_kernel.py": [
        Bug(
            "diagonal",
            "the diagonal is not written",
            "mask = (row <= column) & (column < rows)",
            "mask = (row < column) & (column < rows)",
            of_op("velocity_gram"),
        ),
    ],
    "flowkernels/ops/linear_euler/triton_kernel.py": [
        Bug(
            "counts of lanes",
            "LayerNorm's mean where features are no multiple of a block",
            "count = ((d - lane + BLOCK_D - 1) // BLOCK_D)",
            "count = ((d - lane + BLOCK_D) // BLOCK_D)",
            of_op("linear_euler"),
        ),
        Bug(
            "shift after a norm's bias",
            "LayerNorm's own bias beside a shift",
            "norm_bias.to(dtype) + shift",
            "shift",
            of_op("linear_euler"),
        ),
    ],
    "flowkernels/ops/mlp_sample/triton_kernel.py": [
        Bug(
            "series",
            "ELU and tanh of arguments far from 0",
            "tl.where(x > -0.4,",
            "tl.where(x > -4.0,",
            of_op("mlp_sample"),
        ),
    ],
}

PYTHON = {
    "flowkernels/schedule.py": [
        Bug(
            "equal schedules",
            "schedules of the same times on other grids are equal",
            "torch.equal(self.times, other.times) and grids and mine == theirs",
            "torch.equal(self.times, other.times) and mine == theirs",
            "tests/test_schedule.py",
        ),
    ],
    "flowkernels/solver.py": [
        Bug(
            "inverse Adams-Bashforth",
            "multistep solvers from data to noise",
            "moments = sign ** (powers + 1) / (powers + 1)",
            "moments = sign / (powers + 1)",
            "tests/test_solver.py",
        ),
        Bug(
            "Heun's model time",
            "the second stage is at the knot that its step leaves",
            "at[first + 1] = times[k + 1]",
            "at[first + 1] = times[k]",
            "tests/test_solver.py",
        ),
    ],
    "flowkernels/calibration/bellman.py": [
        Bug(
            "gamma of the uniform cost",
            "the uniform schedule's cost is not weighed by gamma",
            "gamma**i * c for",
            "c for",
            "tests/test_objectives.py tests/test_schedule.py",
        ),
        Bug(
            "least cost with gamma",
            "the cost of a schedule, with gamma",
            "* gamma ** (n - 1)",
            "* gamma**n",
            "tests/test_objectives.py tests/test_schedule.py",
        ),
    ],
    "flowkernels/calibration/objectives.py": [
        Bug(
            "carried errors",
            "objective 'endpoint' counts an increment that a step does not leave out",
            "[errors[1:], torch.zeros_like",
            "[errors[:-1], torch.zeros_like",
            "tests/test_objectives.py",
        ),
        Bug(
            "a free start",
            "objective 'oss' begins at the first knot alone",
            "z[:] = x[0]",
            "z[0] = x[0]",
            "tests/test_objectives.py",
        ),
    ],
    "flowkernels/calibration/gits_costs.py": [
        Bug(
            "the way along the line",
            "GITS's deviation of a step's end takes the teacher's way along the line",
            "(turn - ahead).square()",
            "turn.square()",
            "tests/test_objectives.py",
        ),
        Bug(
            "secants of deviations",
            "GITS's deviations leave out what a secant is off by along the line",
            "ahead[:K] += span[:K] * off[:, i, None]",
            "pass",
            "tests/test_objectives.py",
        ),
    ],
    "flowkernels/calibration/pair_costs.py": [
        Bug(
            "secants of pairs",
            "the costs of pairs leave out what a secant is off by",
            "c.addcmul_(between(off)[:, :, None], h)",
            "pass",
            "tests/test_objectives.py",
        ),
    ],
    "flowkernels/calibration/step_cost.py": [
        Bug(
            "merge",
            "a merged accumulator has the other's sums, not its samples",
            "self.state.add_(other.state.to(self.state.device))",
            "self.gram.add_(other.gram.to(self.state.device))",
            "tests/test_step_cost.py",
        ),
    ],
    "flowkernels/calibration/stepwise.py": [
        Bug(
            "held-out error",
            "what decides between orders and ridges",
            "out = torch.cat([-change, torch.ones_like",
            "out = torch.cat([change, torch.ones_like",
            "tests/test_fit.py",
        ),
        Bug(
            "own fold",
            "a sample's error is of a fit that has seen it",
            "has = 1 - torch.eye(F + 1, F,",
            "has = 1 - 0 * torch.eye(F + 1, F,",
            "tests/test_fit.py",
        ),
        Bug(
            "differences",
            "the sign in which a difference of velocities takes part",
            "weights[..., :-1] -= change[..., 1:p]",
            "weights[..., :-1] += change[..., 1:p]",
            "tests/test_fit.py",
        ),
        Bug(
            "no velocity",
            "a velocity of zero makes NaN",
            "size = torch.where(size > 0, size, 1.0)  # no velocity",
            "size = torch.where(size >= 0, size, 1.0)  # no velocity",
            "tests/test_fit.py",
        ),
        Bug(
            "prior",
            "a fit of three velocities departs from Adams-Bashforth 2",
            "min(p, 3), p + free",
            "min(p, 2), p + free",
            "tests/test_fit.py",
        ),
    ],
    "flowkernels/calibration/endpoint_problem.py": [
        Bug(
            "times past the teacher's",
            "a polished solver asks for times at which the teacher was not evaluated",
            "t[i] = min(max(t[i].item() + change, self.limits[i][0]), self.limits[i][1])",
            "t[i] = max(t[i].item() + change, self.limits[i][0])",
            "tests/test_fit.py tests/test_refine.py",
        ),
        Bug(
            "derivative's places",
            "the derivatives in the coefficients of earlier velocities",
            "by * (start if where == FROM_START else v[where])",
            "by * (start if where == FROM_START else v[-1])",
            "tests/test_fit.py tests/test_refine.py",
        ),
        Bug(
            "a time's own step",
            "what a changed time changes in later states",
            "add_(change, alpha=b[j][i])",
            "add_(change, alpha=b[i][i])",
            "tests/test_fit.py tests/test_refine.py",
        ),
    ],
    "flowkernels/calibration/refine.py": [
        Bug(
            "errors of others",
            "errors of one sample are told of another",
            "part = data.in_order([*mine, *other])",
            "part = data.in_order([*other, *mine])",
            "tests/test_refine.py",
        ),
    ],
    "flowkernels/sampling/loop.py": [
        Bug(
            "memory of an earlier velocity",
            "a network that returns the same memory each time spoils the earlier velocities of a multistep solver",
            "if kept or self.begin <= v.data_ptr() < self.end:",
            "if self.begin <= v.data_ptr() < self.end:",
            "tests/test_solver_sampling.py",
        ),
    ],
    "flowkernels/sampling/capture.py": [
        Bug(
            "autocast",
            "a loop that was compiled outside autocast runs inside it",
            "x.device, autocast, settings",
            "x.device, settings",
            "tests/test_capture.py",
        ),
    ],
    "flowkernels/sampling/state.py": [
        Bug(
            "minus zero",
            "a setting that turned from 0.0 to -0.0",
            "equal = a.hex() == b.hex() if",
            "equal = a == b if",
            "tests/test_state.py",
        ),
        Bug(
            "defaults",
            "other defaults of a function",
            "parts, kinds, names = [f.__defaults__, f.__kwdefaults__, f.__dict__], [], _names(f.__code__)",
            "parts, kinds, names = [None, f.__kwdefaults__, f.__dict__], [], _names(f.__code__)",
            "tests/test_state.py",
        ),
    ],
    "flowkernels/fusion/lowering.py": [
        Bug(
            "gate",
            "GLU's halves",
            'self._source(b), b.width, activation="sigmoid")',
            'self._source(a), b.width, activation="sigmoid")',
            "tests/test_fuse.py",
        ),
        Bug(
            "alpha",
            "torch.add's alpha where the value that it multiplies is the earlier one",
            "(p, q) if alpha != 1 else sorted((p, q)",
            "sorted((p, q)",
            "tests/test_fuse_operations.py",
        ),
    ],
    "flowkernels/fusion/sampler.py": [
        Bug(
            "parts of many samples",
            "the order of the parts that many samples are taken in",
            "parts.append(self.rows(rows, n).run(",
            "parts.insert(0, self.rows(rows, n).run(",
            "tests/test_fuse.py",
        ),
    ],
    "flowkernels/_guidance.py": [
        Bug(
            "precision",
            "guidance in the network's precision",
            "return base + guidance * (v.to(dtype) - base)",
            "return (v_uncond + guidance * (v - v_uncond)).to(dtype)",
            "tests/test_velocity_field.py tests/test_rollout_sample.py",
        ),
    ],
    "flowkernels/velocity/field.py": [
        Bug(
            "time in float64",
            "the network's time is formed in the state's precision",
            "t = exact_time(t).to(float64_device(t.device), torch.float64)",
            "t = t.to(float64_device(t.device), torch.float64)",
            "tests/test_network_times.py",
        ),
    ],
    "flowkernels/training/targets/base.py": [
        Bug(
            "time of a point",
            "points of an interval are trained at the time of its begin",
            "t = self.start if u is None else self.start + u * self.size",
            "t = self.start if u is None else self.start + 0 * u * self.size",
            "tests/test_straighten.py",
        ),
    ],
    "flowkernels/training/targets/endpoint.py": [
        Bug(
            "gradient of a solver",
            "the gradient of a solver's end leaves out the way through its states",
            "v.append(call.velocity(x, now))",
            "v.append(call.velocity(x.detach(), now))",
            "tests/test_straighten.py -k solvers_end",
        ),
    ],
    "flowkernels/training/targets/own_states.py": [
        Bug(
            "row of a solver",
            "the target of a step on a solver is formed with the row of the one before",
            "linear_update(start, v, b[k][:k], scale=a[k])",
            "linear_update(start, v, b[k - 1][:k], scale=a[k])",
            "tests/test_straighten.py -k solver",
        ),
        Bug(
            "time of own states",
            "a student's own states are made with its velocities at the next knot",
            "at[k], rows.start",
            "at[k + 1], rows.start",
            "tests/test_targets_teacher.py",
        ),
    ],
    "flowkernels/training/bank/trajectory_bank.py": [
        Bug(
            "a part of a bank",
            "a refresh of a fraction rounds the number of chunks down",
            "max(1, math.ceil(fraction * self.chunks - 1e-9))",
            "max(1, math.floor(fraction * self.chunks + 1e-9))",
            "tests/test_bank.py",
        ),
    ],
    "flowkernels/training/bank/storage.py": [
        Bug(
            "the other end",
            "both ends of an interval are the first",
            "torch.cat([first * n + sample, last * n + sample])",
            "torch.cat([first * n + sample, first * n + sample])",
            "tests/test_bank.py",
        ),
    ],
    "flowkernels/training/bank/shards.py": [
        Bug(
            "a shard's place",
            "a shard of the same bank is taken in another's place",
            'metadata.get("bank") != self.id or metadata.get("chunk") != str(k)',
            'metadata.get("bank") != self.id',
            "tests/test_bank.py",
        ),
    ],
    "flowkernels/training/bank/teacher_states.py": [
        Bug(
            "first stages",
            "of a trajectory back from data the states before Heun's corrections are kept",
            "K - (i + 1) // 2 if i % 2 else None",
            "None if i % 2 else K - i // 2 - 1",
            "tests/test_bank.py",
        ),
    ],
    "flowkernels/training/run/state.py": [
        Bug(
            "generator of the bank",
            "a resumed run draws another bank",
            'self.generator.set_state(saved["bank_rng"])',
            'self.generator.set_state(saved["rng"])',
            "tests/test_straighten.py -k resum",
        ),
        Bug(
            "samples of a student",
            "a resumed run takes its student's own samples with other weights",
            "load_weights(self.student, self.rolled_out)",
            "pass",
            "tests/test_straighten.py -k resum",
        ),
        Bug(
            "sums at the end of a run",
            "a run that goes on after its end has lost the losses since its last regular row",
            "if regular:",
            "if True:",
            "tests/test_straighten_watch.py -k extended",
        ),
    ],
    "flowkernels/training/run/evaluations.py": [
        Bug(
            "best of the end",
            "a run that goes on after its end keeps the weights of a row that a longer run would not have",
            "self.keeps_best and self._is_regular(found.iteration)",
            "self.keeps_best",
            "tests/test_straighten_watch.py -k extended",
        ),
    ],
    "flowkernels/training/run/held_out.py": [
        Bug(
            "draws of a slice",
            "what the loss of a held-out trajectory draws depends on the batch that it is in",
            "generator.set_state(before)",
            "pass",
            "tests/test_straighten_watch.py -k slices",
        ),
        Bug(
            "states of the training",
            "after an evaluation a target is trained on the states of what is held out",
            "objective.rolled_out = kept",
            "pass",
            "tests/test_straighten_watch.py -k slices",
        ),
    ],
    "flowkernels/training/run/average.py": [
        Bug(
            "gathered before",
            "samples with averaged weights that are those which a sharded student has gathered before",
            "torch.clear_autocast_cache(), reshard(self._student)\n        for name",
            "torch.clear_autocast_cache()\n        for name",
            "tests/test_student_weights.py -k average_in_a_block",
        ),
        Bug(
            "trained after",
            "weights of a schedule-free optimiser that a checkpoint rounds",
            "local(p).copy_(kept[name])",
            "local(p)",
            "tests/test_optimizers.py -k schedule_free",
        ),
    ],
    "flowkernels/training/students/unchanged.py": [
        Bug(
            "buffers tried",
            "a trial of a student that is counted in its BatchNorm",
            "if not torch.equal(local(buffer), local(before)):",
            "if buffer is before:",
            "tests/test_student_weights.py -k leaves_a_student",
        ),
    ],
    "flowkernels/training/run/optimizers.py": [
        Bug(
            "counted",
            "what an optimiser counts in its groups is not taken from a checkpoint",
            "return {key for group in opt.param_groups for key in group} - taken",
            "return set()",
            "tests/test_optimizers.py -k schedule",
        ),
    ],
    "flowkernels/training/run/descent.py": [
        Bug(
            "gradients of others",
            "gradients of parameters that no optimiser has add up, and count in the norm",
            "self.parameters = [p for p in parameters if id(p) in stepped]",
            "self.parameters = parameters",
            "tests/test_optimizers.py -k leaves_out",
        ),
    ],
    "flowkernels/training/run/checkpoint.py": [
        Bug(
            "sum",
            "a damaged checkpoint is read",
            "expect_unchanged(saved.pop(SUM), tensors_hash(saved))",
            "saved.pop(SUM)",
            "tests/test_damaged_checkpoints.py tests/test_straighten.py",
        ),
    ],
    "flowkernels/_files.py": [
        Bug(
            "permissions",
            "a file that is replaced has other permissions",
            "_take_over(partial, before)\n",
            "pass\n",
            "tests/test_files.py",
        ),
        Bug(
            "keys twice",
            "a JSON file with a key twice is read",
            "if len(found) < len(pairs):",
            "if len(found) < len(pairs) - 1:",
            "tests/test_files.py",
        ),
    ],
    "flowkernels/integrations/diffusers/scheduler.py": [
        Bug(
            "memory of an earlier velocity",
            "a pipeline that hands its velocities in the same memory spoils the earlier ones",
            "self._past[i] = v.clone() if keeps else v",
            "self._past[i] = v",
            "tests/test_solver_scheduler.py",
        ),
        Bug(
            "changed states",
            "what a pipeline changes between steps is lost by a solver that starts from x_0",
            "updates(chained=True)",
            "updates()",
            "tests/test_solver_scheduler.py",
        ),
        Bug(
            "scaled states of an image",
            "a start within a solver multiplies the state of an image by what is for the solver's own states",
            "(update.scale == 1 or begin == 0)",
            "True",
            "tests/test_solver_scheduler.py -k constant",
        ),
    ],
    "flowkernels/cli/inputs.py": [
        Bug(
            "guidance of a student",
            "guidance that a student has learned is applied once more",
            "model = as_given(resolve(model).without_guidance())",
            "model = as_given(resolve(model))",
            "tests/test_cli.py -k guid",
        ),
    ],
    "flowkernels/evaluation/distances.py": [
        Bug(
            "energy distance",
            "distances across the sets count once",
            "2 * rows.mean()",
            "rows.mean()",
            "tests/test_distances.py",
        ),
    ],
    "flowkernels/evaluation/straightness.py": [
        Bug(
            "points of an interval",
            "straightness is looked at at the beginning of each part of an interval",
            "(i + 0.5) / points",
            "i / points",
            "tests/test_evaluation.py -k 'figures or straight'",
        ),
    ],
    "flowkernels/evaluation/likelihood.py": [
        Bug(
            "levels",
            "the width of levels counts twice the wrong way",
            "nats = each.mean(1) - offset",
            "nats = each.mean(1) + offset",
            "tests/test_likelihood.py -k levels",
        ),
        Bug(
            "restarted updates",
            "the divergence does not begin anew where a solver's state does",
            "(start, none) if update.from_start",
            "(start, change) if update.from_start",
            "tests/test_likelihood.py",
        ),
    ],
    "flowkernels/evaluation/measure.py": [
        Bug(
            "evaluations of a network",
            "guidance counts as one evaluation",
            "(2 if callable(guidance)",
            "(1 if callable(guidance)",
            "tests/test_evaluation.py -k guidance",
        ),
    ],
    "flowkernels/evaluation/images.py": [
        Bug(
            "gray values",
            "images of samples are half as bright",
            "(255 / (high - low))",
            "(127.5 / (high - low))",
            "tests/test_images.py",
        ),
    ],
}

KINDS = {"C++": CPU, "CUDA": CUDA, "Triton": TRITON, "Python": PYTHON}
BUGS = [(kind, file, bug) for kind, files in KINDS.items() for file, bugs in files.items() for bug in bugs]

"""What the machine code of the kernels of straighten_loss is like, and what they have to move and compute at least."""

from machine_code.rules import LOW, Floor, Rule

CUDA = [
    # the accesses of segment_points, with velocities and their gradient in place of the points; narrow: the weight, the
    # sums
    Rule(
        r"straighten_loss_kernel<(float, float, 4|double, double, 2)>",
        64,
        0.5,
        has="LDG.128>=9 LDG.narrow<=4 STG.128>=4 STG.narrow<=2",
    ),
    Rule(rf"straighten_loss_kernel<float, {LOW}, 4>", 48, 0.62, has="LDG.128>=6 LDG.narrow<=4 STG>=6 STG.narrow<=2"),
    Rule(r"straighten_loss_kernel<float, .*, 2>", 40, 0.75),
    Rule(r"straighten_loss_kernel<float, .*, 1>", 48, 0.62),
    Rule(r"straighten_loss_kernel<double, double, 1>", 64, 0.5),
    Rule(
        r"straighten_loss_held_kernel<float, float, 4>",
        64,
        0.5,
        has="LDG.128>=12 LDG.narrow<=2 STG.128>=4 STG.narrow<=1",
    ),
    Rule(
        rf"straighten_loss_held_kernel<float, {LOW}, 4>", 56, 0.5, has="LDG.128>=8 LDG.narrow<=2 STG>=4 STG.narrow<=1"
    ),
    Rule(r"straighten_loss_held_kernel<float, .*, [12]>", 48, 0.62),
    Rule(r"straighten_loss_held_kernel<double, double, 2>", 80, 0.375, has="LDG.128>=12 STG.128>=4"),
    Rule(r"straighten_loss_held_kernel<double, double, 1>", 56, 0.5),
    Rule(r"straighten_loss_join_kernel<.*>", 32, 1.0),
    Rule(r"straighten_loss_mean_kernel<.*>", 48, 0.5),
    Rule(r"straighten_loss_join_means_kernel<.*>", 32, 1.0),
    Rule(
        rf"straighten_loss_scale_kernel<(float, float, 4|double, double, 2|float, {LOW}, 8)>",
        32,
        1.0,
        has="LDG.128 STG.128",
    ),
    Rule(rf"straighten_loss_scale_kernel<(float, float, [12]|double, double, 1|float, {LOW}, [124])>", 32, 1.0),
]

TRITON = [
    Rule(r"straighten_loss_held_kernel<v=(float32|float64).*", 56, 0.56, has="LDG.128 STG.128"),
    Rule(r"straighten_loss_held_kernel<v=b?float16.*", 40, 1.0, has="LDG.128"),
    Rule(r"straighten_loss_part_kernel<.*", 56, 0.56, has="LDG.128", spilled={"3.6": 8}),  # for sm_120
    Rule(r"straighten_loss_gradient_kernel<.*", 40, 0.75, has="LDG.128 STG.128"),
    Rule(r"straighten_loss_join_kernel<.*", 24, 1.0, has="LDG.128"),
    Rule(r"straighten_loss_mean_kernel<per_sample=float32.*", 48, 0.62, has="LDG.128", older={"3.6": 56}),
    Rule(r"straighten_loss_mean_kernel<per_sample=float64.*", 80, 0.37, has="LDG.128"),
]

FLOORS = [
    # two rows of the bank, velocities, their gradient; a join and a mean follow
    Floor(
        case="n=256, D=65536, l2, float32",  # places all different
        sizes=dict(B=256, D=65536),
        moves="B * D * (4 + 4 + 4 + 4)",
        computes="B * D * 6",
        unit="fp32",
        elements="B * D",
        kernel="straighten_loss_kernel<float, float, 4>",
        blocks="1024",
        issues="B * D / 4 / 32 * STG_128",
        launches=3,
    ),
]

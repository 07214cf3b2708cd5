"""Embedded Runge-Kutta pairs as data: a step, an estimate of its error, and the solution inside the step.

    k_i = u(t + c_i dt, z + dt sum_j a_ij k_j),    z' = z + dt sum_j a_sj k_j,    error = dt sum_i e_i k_i

Every pair here evaluates its last stage s at the new state, so that this velocity is the next step's first one: of s
stages, s - 1 are paid for by an attempted step. b is the last row of a. Inside the step, 0 <= x <= 1,

    z(t + x dt) = z + dt sum_j phi_j(x) sum_i F_ji k_i,    phi = x, x (1 - x), x^2 (1 - x), x^2 (1 - x)^2, ...

F_0 to F_2 make the cubic through both ends and their velocities; further rows, of `dense`, are the pair's own.

Source: Hairer, Norsett, Wanner, "Solving Ordinary Differential Equations I", sections II.4 to II.6.
"""

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Pair:
    """a: strictly lower triangular, row i of at most i entries, zeros at its end left out; the last row is b.

    order: of z'. controlled: the error of a step falls as dt^controlled. errors: one row of e, or two that
    combine to e^2 / sqrt(e^2 + 0.01 e'^2) in the norm. order_inside: of z(t + x dt). extra_a, extra_c: stages of the
    solution inside the step, evaluated where it is asked for.
    """

    order: int
    controlled: int
    order_inside: int
    a: tuple[tuple[float, ...], ...]
    c: tuple[float, ...]
    errors: tuple[tuple[float, ...], ...]
    dense: tuple[tuple[float, ...], ...] = ()
    extra_a: tuple[tuple[float, ...], ...] = ()
    extra_c: tuple[float, ...] = ()

    @property
    def b(self):
        return self.a[-1]

    @property
    def num_stages(self):
        return len(self.c)

    @property
    def evaluations(self):
        """Of an attempted step."""
        return self.num_stages - 1

    @cached_property
    def inside(self):
        """The rows F, each with an entry for every stage, extra ones included."""
        total = self.num_stages + len(self.extra_c)
        b, first, last = _filled(self.b, total), _unit(0, total), _unit(self.num_stages - 1, total)
        rise = tuple(f - s for f, s in zip(first, b))
        bend = tuple(2 * s - f - g for s, f, g in zip(b, first, last))
        return (b, rise, bend, *(_filled(row, total) for row in self.dense))


def _filled(row, length):
    return (*row, *[0.0] * (length - len(row)))


def _unit(position, length):
    return tuple(float(j == position) for j in range(length))


def _sparse(**entries):
    """A row from its entries k1=..., k12=... that are not zero."""
    numbers = {int(name[1:]) - 1: value for name, value in entries.items()}
    return tuple(numbers.get(j, 0.0) for j in range(max(numbers) + 1))


# Heun's method with Euler's beside it; the last stage is not theirs, it is the next step's first.
ADAPTIVE_HEUN = Pair(
    order=2,
    controlled=2,
    order_inside=2,
    a=((), (1,), (1 / 2, 1 / 2)),
    c=(0, 1, 1),
    errors=((-1 / 2, 1 / 2),),
)

# Bogacki, Shampine, "A 3(2) pair of Runge-Kutta formulas", Appl. Math. Lett. 2 (1989).
BOSH3 = Pair(
    order=3,
    controlled=3,
    order_inside=3,
    a=((), (1 / 2,), (0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
    c=(0, 1 / 2, 3 / 4, 1),
    errors=((2 / 9 - 7 / 24, 1 / 3 - 1 / 4, 4 / 9 - 1 / 3, -1 / 8),),
)

# Dormand, Prince, "A family of embedded Runge-Kutta formulae", J. Comp. Appl. Math. 6 (1980), RK5(4)7M. The error is
# that of Shampine, "Some practical Runge-Kutta formulas", Math. Comp. 46 (1986): 2/3 of theirs, as torchdiffeq has it.
# Inside the step the fourth order of Hairer, Norsett, Wanner, II.6.
DOPRI5 = Pair(
    order=5,
    controlled=5,
    order_inside=4,
    a=(
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    c=(0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1),
    errors=((71 / 86400, 0, -142 / 50085, 71 / 2880, -5751 / 169600, 44 / 1575, -1 / 60),),
    dense=(
        (
            -12715105075 / 11282082432,
            0,
            87487479700 / 32700410799,
            -10690763975 / 1880347072,
            701980252875 / 199316789632,
            -1453857185 / 822651844,
            69997945 / 29380423,
        ),
    ),
)

# Tsitouras, "Runge-Kutta pairs of order 5(4) satisfying only the first column simplifying assumption", Comput. Math.
# Appl. 62 (2011); `dense` holds the coefficients of x^4 in its interpolant.
TSIT5 = Pair(
    order=5,
    controlled=5,
    order_inside=4,
    a=(
        (),
        (0.161,),
        (-0.008480655492356989, 0.335480655492357),
        (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
        (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
        (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383),
        (
            0.09646076681806523,
            0.01,
            0.4798896504144996,
            1.379008574103742,
            -3.290069515436081,
            2.324710524099774,
        ),
    ),
    c=(0, 0.161, 0.327, 0.9, 0.9800255409045097, 1, 1),
    errors=(
        (
            -0.00178001105222577714,
            -0.0008164344596567469,
            0.007880878010261995,
            -0.1447110071732629,
            0.5823571654525552,
            -0.45808210592918697,
            1 / 66,
        ),
    ),
    dense=(
        (
            -1.0530884977290216,
            0.1017,
            2.490627285651253,
            -16.548102889244902,
            47.37952196281928,
            -34.87065786149661,
            2.5,
        ),
    ),
)

# Dormand and Prince's method of order 8 with errors of order 5 and 3 and the seventh order inside the step: the
# published constants of DOP853 (Hairer, Norsett, Wanner, II.5 and II.6).
DOPRI8 = Pair(
    order=8,
    controlled=8,
    order_inside=7,
    a=(
        (),
        _sparse(k1=0.05260015195876773),
        _sparse(k1=0.0197250569845379, k2=0.0591751709536137),
        _sparse(k1=0.02958758547680685, k3=0.08876275643042054),
        _sparse(k1=0.2413651341592667, k3=-0.8845494793282861, k4=0.924834003261792),
        _sparse(k1=0.037037037037037035, k4=0.17082860872947386, k5=0.12546768756682242),
        _sparse(k1=0.037109375, k4=0.17025221101954405, k5=0.06021653898045596, k6=-0.017578125),
        _sparse(
            k1=0.03709200011850479,
            k4=0.17038392571223998,
            k5=0.10726203044637328,
            k6=-0.015319437748624402,
            k7=0.008273789163814023,
        ),
        _sparse(
            k1=0.6241109587160757,
            k4=-3.3608926294469414,
            k5=-0.868219346841726,
            k6=27.59209969944671,
            k7=20.154067550477894,
            k8=-43.48988418106996,
        ),
        _sparse(
            k1=0.47766253643826434,
            k4=-2.4881146199716677,
            k5=-0.590290826836843,
            k6=21.230051448181193,
            k7=15.279233632882423,
            k8=-33.28821096898486,
            k9=-0.020331201708508627,
        ),
        _sparse(
            k1=-0.9371424300859873,
            k4=5.186372428844064,
            k5=1.0914373489967295,
            k6=-8.149787010746927,
            k7=-18.52006565999696,
            k8=22.739487099350505,
            k9=2.4936055526796523,
            k10=-3.0467644718982196,
        ),
        _sparse(
            k1=2.273310147516538,
            k4=-10.53449546673725,
            k5=-2.0008720582248625,
            k6=-17.9589318631188,
            k7=27.94888452941996,
            k8=-2.8589982771350235,
            k9=-8.87285693353063,
            k10=12.360567175794303,
            k11=0.6433927460157636,
        ),
        _sparse(
            k1=0.054293734116568765,
            k6=4.450312892752409,
            k7=1.8915178993145003,
            k8=-5.801203960010585,
            k9=0.3111643669578199,
            k10=-0.1521609496625161,
            k11=0.20136540080403034,
            k12=0.04471061572777259,
        ),
    ),
    c=(
        0.0,
        0.05260015195876773,
        0.0789002279381516,
        0.1183503419072274,
        0.2816496580927726,
        0.3333333333333333,
        0.25,
        0.3076923076923077,
        0.6512820512820513,
        0.6,
        0.8571428571428571,
        1.0,
        1.0,
    ),
    errors=(
        _sparse(
            k1=0.01312004499419488,
            k6=-1.2251564463762044,
            k7=-0.4957589496572502,
            k8=1.6643771824549864,
            k9=-0.35032884874997366,
            k10=0.3341791187130175,
            k11=0.08192320648511571,
            k12=-0.022355307863886294,
        ),
        _sparse(
            k1=-0.18980075407240762,
            k6=4.450312892752409,
            k7=1.8915178993145003,
            k8=-5.801203960010585,
            k9=-0.4226823213237919,
            k10=-0.1521609496625161,
            k11=0.20136540080403034,
            k12=0.02265179219836082,
        ),
    ),
    dense=(
        _sparse(
            k1=-8.428938276109013,
            k6=0.5667149535193777,
            k7=-3.0689499459498917,
            k8=2.38466765651207,
            k9=2.117034582445028,
            k10=-0.871391583777973,
            k11=2.2404374302607883,
            k12=0.6315787787694688,
            k13=-0.08899033645133331,
            k14=18.148505520854727,
            k15=-9.194632392478356,
            k16=-4.436036387594894,
        ),
        _sparse(
            k1=10.427508642579134,
            k6=242.28349177525817,
            k7=165.20045171727028,
            k8=-374.5467547226902,
            k9=-22.113666853125306,
            k10=7.733432668472264,
            k11=-30.674084731089398,
            k12=-9.332130526430229,
            k13=15.697238121770845,
            k14=-31.139403219565178,
            k15=-9.35292435884448,
            k16=35.81684148639408,
        ),
        _sparse(
            k1=19.985053242002433,
            k6=-387.0373087493518,
            k7=-189.17813819516758,
            k8=527.8081592054236,
            k9=-11.57390253995963,
            k10=6.8812326946963,
            k11=-1.0006050966910838,
            k12=0.7777137798053443,
            k13=-2.778205752353508,
            k14=-60.19669523126412,
            k15=84.32040550667716,
            k16=11.99229113618279,
        ),
        _sparse(
            k1=-25.69393346270375,
            k6=-154.18974869023643,
            k7=-231.5293791760455,
            k8=357.6391179106141,
            k9=93.40532418362432,
            k10=-37.45832313645163,
            k11=104.0996495089623,
            k12=29.8402934266605,
            k13=-43.53345659001114,
            k14=96.32455395918828,
            k15=-39.17726167561544,
            k16=-149.72683625798564,
        ),
    ),
    extra_a=(
        _sparse(
            k1=0.056167502283047954,
            k7=0.25350021021662483,
            k8=-0.2462390374708025,
            k9=-0.12419142326381637,
            k10=0.15329179827876568,
            k11=0.00820105229563469,
            k12=0.007567897660545699,
            k13=-0.008298,
        ),
        _sparse(
            k1=0.03183464816350214,
            k6=0.028300909672366776,
            k7=0.053541988307438566,
            k8=-0.05492374857139099,
            k11=-0.00010834732869724932,
            k12=0.0003825710908356584,
            k13=-0.00034046500868740456,
            k14=0.1413124436746325,
        ),
        _sparse(
            k1=-0.42889630158379194,
            k6=-4.697621415361164,
            k7=7.683421196062599,
            k8=4.06898981839711,
            k9=0.3567271874552811,
            k13=-0.0013990241651590145,
            k14=2.9475147891527724,
            k15=-9.15095847217987,
        ),
    ),
    extra_c=(0.1, 0.2, 0.7777777777777778),
)

PAIRS = {"dopri5": DOPRI5, "dopri8": DOPRI8, "bosh3": BOSH3, "adaptive_heun": ADAPTIVE_HEUN, "tsit5": TSIT5}

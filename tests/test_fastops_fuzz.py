"""fastops under attack: whatever comes, both back ends raise the same error or compute the same bits."""

import warnings

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastops
from fastops import reference

CALM = settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=1000)
SPECIAL = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-40, 1e38, -3e38, 1e300, np.inf, -np.inf, np.nan]

seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(0, 9)
rates = st.one_of(st.sampled_from([0, 1, 0.99, 0.95, 1e-320, np.float32(0.5), np.int64(1)]), st.floats(0, 1))


def numbers(dtype, shape, seed):
    rng, dtype = np.random.default_rng(seed), np.dtype(dtype)
    if dtype.kind != "f":
        return rng.integers(0, 2 if dtype.kind == "b" else 256, shape).astype(dtype)
    array = rng.normal(size=shape) * 10.0 ** rng.integers(-3, 4)
    if seed % 3 == 0:
        array = np.where(rng.random(shape) < 0.2, rng.choice(SPECIAL, shape), array)
    with np.errstate(all="ignore"):
        return np.asarray(array).astype(dtype)


def unaligned(array):
    raw = np.zeros(array.nbytes + 1, np.uint8)[1:]
    raw[:] = np.frombuffer(array.tobytes(), np.uint8)
    return raw.view(array.dtype).reshape(array.shape)


def readonly(array):
    array = array.copy()
    array.flags.writeable = False
    return array


# One thing changed about an array; some changes are harmless.
TWISTS = {
    "dtype": lambda a: a.astype("S8"),
    "object": lambda a: a.astype(object),
    "byteorder": lambda a: a.astype(a.dtype.newbyteorder()),
    "longer": lambda a: np.concatenate([a, a[:1]]),
    "shorter": lambda a: a[:-1],
    "axis": lambda a: a[None],
    "flat": lambda a: a.ravel(),
    "fortran": np.asfortranarray,
    "reversed": lambda a: a[..., ::-1],
    "upside down": lambda a: a[::-1],
    "strided": lambda a: np.repeat(a, 2, -1)[..., ::2],
    "windows": lambda a: np.lib.stride_tricks.as_strided(a, a.shape, (a.itemsize,) * a.ndim),
    "unaligned": unaligned,
    "readonly": readonly,
    "masked": np.ma.masked_array,
    "list": lambda a: a.tolist(),
    "buffer": memoryview,
    "none": lambda a: None,
    "string": lambda a: "array",
    "number": lambda a: 1.5,
}
BAD_NUMBERS = [-1, 2, np.nan, np.inf, None, "0.9", True, 1j, 10**400, [0.5], 0, 1]


@st.composite
def one_twist(draw, names):
    """A function that leaves arguments alone, or breaks one."""
    active, name = draw(st.booleans()), draw(st.sampled_from(names))
    how, number = draw(st.sampled_from(sorted(TWISTS))), draw(st.sampled_from(BAD_NUMBERS))

    def apply(**arguments):
        value = arguments[name]
        if active and isinstance(value, np.ndarray):
            flexible = value if value.ndim else value.reshape(1)
            arguments[name] = TWISTS[how](flexible)
        elif active and value is not None:
            arguments[name] = number
        return arguments

    return apply


def outcome(function, arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nor do they warn
        try:
            return "computed", function(**arguments)
        except (TypeError, ValueError) as error:
            return type(error).__name__, str(error)


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        a, b = tuple(a.values()), tuple(b.values())
    if isinstance(a, np.ndarray) and not a.dtype.hasobject:
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b, strict=True)
    elif isinstance(a, tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, (str, int, float)):
        assert a == b or (a != a and b != b)


def both(name, make):
    """Call both back ends with arguments made twice, and compare the results and what was written in place."""
    mine, twins = make(), make()
    results = outcome(getattr(fastops, name), mine), outcome(getattr(reference, name), twins)
    assert_same(*results)
    assert_same(mine, twins)
    if results[0][0] != "computed":
        assert_same(mine, make())  # nothing was written
        argument, _, message = results[0][1].partition(": ")
        assert argument in mine and message.startswith("expected") and "got" in message


@CALM
@given(sizes, sizes, seeds, rates, rates, st.sampled_from([None, "?", "f", "any"]),
       one_twist(["rewards", "values", "dones", "last_value", "gamma", "lam"]))  # fmt: skip
def test_gae(steps, envs, seed, gamma, lam, dones, twist):
    def make():
        return twist(
            rewards=numbers("f", (steps, envs), seed),
            values=numbers("f", (steps, envs), seed + 3),
            dones=dones and numbers("f" if dones == "any" else "?", (steps, envs), 0).astype(dones.replace("any", "f")),
            last_value=numbers("f", envs, seed + 6),
            gamma=gamma,
            lam=lam,
        )

    both("gae", make)


@CALM
@given(sizes, sizes, seeds, rates, st.booleans(), st.one_of(st.none(), st.integers(0, 60)),
       one_twist(["rewards", "carry", "gamma", "reverse"]))  # fmt: skip
def test_discounted_sum(steps, envs, seed, gamma, reverse, overlap, twist):
    def make():
        rewards, carry = numbers("f", (steps, envs), seed), numbers("d", envs, seed + 3)
        if overlap is not None and seed % 5 == 0:  # one memory for both
            memory = np.zeros(200)
            rewards = memory[:50].view(np.float32)[: rewards.size].reshape(steps, envs)
            carry = memory[overlap : overlap + envs]
        return twist(rewards=rewards, carry=carry, gamma=gamma, reverse=reverse)

    both("discounted_sum", make)


sides = st.one_of(st.sampled_from([84, 160, 168, 210, 250, 252]), st.integers(80, 300))


@CALM
@given(sides, sides, seeds, one_twist(["frame_a", "frame_b", "out", "palette"]))
def test_max_pool_resize(height, width, seed, twist):
    def make():
        rng = np.random.default_rng(seed)
        top = int(rng.choice([1, 2, 3, 256]))
        a, b = rng.integers(0, top, (2, height, width), dtype=np.uint8)
        b = np.where(rng.random((height, 1)) < 0.5, a, b)
        for frame in (a, b):  # rows that repeat the one above
            again = np.flatnonzero(rng.random(height - 1) < 0.3)
            frame[again + 1] = frame[again]
        out = rng.integers(0, 256, (84, 84), dtype=np.uint8)
        if rng.random() < 0.1 and a.size > 8000:  # inside a frame
            out = a.reshape(-1)[rng.integers(0, 900) :][: 84 * 84].reshape(84, 84)
        palette = rng.integers(0, 256, 256, dtype=np.uint8) if rng.random() < 0.4 else None
        return twist(frame_a=a, frame_b=a if rng.random() < 0.1 else b, out=out, palette=palette)

    both("max_pool_resize", make)


@CALM
@given(st.integers(0, 40), st.integers(0, 40), seeds, one_twist(["rgb", "out"]))
def test_rgb_to_gray(height, width, seed, twist):
    def make():
        memory = np.random.default_rng(seed).integers(0, 256, 4 * height * width, dtype=np.uint8)
        split = 3 * height * width - (seed % 10 == 0)  # sometimes a byte of overlap
        out = memory[split : split + height * width].reshape(height, width)
        return twist(rgb=memory[: 3 * height * width].reshape(height, width, 3), out=out)

    both("rgb_to_gray", make)


@st.composite
def makers(draw, shape):
    """What is done to statistics of `shape`: the method, and a function that makes its arguments."""
    kind = draw(st.sampled_from(["update", "update", "normalize", "merge", "load_state_dict"]))
    seed, lead = draw(seeds), tuple(draw(st.lists(st.integers(0, 4), max_size=2)))
    dtype, where = draw(st.sampled_from("Bfd")), draw(st.sampled_from(["new", "given", "in place"]))
    clip, count = draw(st.sampled_from([5, 0.1, np.inf, 1e-300, 1e300])), draw(st.sampled_from([1, 7.5, 1e300, 0, -1]))
    names = {"update": ["batch"], "normalize": ["x", "clip", "out"]}.get(kind, ["mean", "var", "count"])
    twist = draw(one_twist(names))

    def make():
        array = numbers(dtype, lead + shape, seed)
        if kind == "update":
            return twist(batch=array)
        if kind == "normalize":
            out = {"new": None, "given": np.zeros(array.shape, np.float32), "in place": array}[where]
            return twist(x=array, clip=clip, out=out)
        arguments = twist(mean=numbers("d", shape, seed), var=abs(numbers("d", shape, seed + 3)), count=count)
        return {"state": arguments} if kind == "load_state_dict" else arguments

    return kind, make


@CALM
@given(st.lists(st.integers(1, 4), max_size=3), st.data())
def test_running_mean_std(sides, data):
    shape = tuple(sides)
    mine, twin = fastops.RunningMeanStd(shape), reference.RunningMeanStd(shape)
    for kind, make in data.draw(st.lists(makers(shape), min_size=1, max_size=5)):
        before, arguments, twin_arguments = mine.state_dict(), make(), make()
        results = outcome(getattr(mine, kind), arguments), outcome(getattr(twin, kind), twin_arguments)
        assert_same(results, results[::-1])
        assert_same(arguments, twin_arguments)
        assert_same(mine.state_dict(), twin.state_dict())
        assert mine.mean.shape == mine.var.shape == mine.std.shape == shape and type(mine.count) is float
        if results[0][0] != "computed" or kind == "normalize":
            assert_same(mine.state_dict(), before)


anything = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.binary(max_size=9), st.just(...),
    st.lists(st.floats(), max_size=3), st.tuples(st.integers(-2, 9), st.integers(-2, 9)), st.just(np.ndarray),
    st.builds(numbers, st.sampled_from([*"Bb?efdhQ"]), st.lists(sizes, max_size=3), seeds),
    st.sampled_from([np.zeros((210, 160), np.uint8), np.zeros((84, 84), np.uint8), np.zeros((3, 2), ">f4"),
                     np.zeros(3, "M8[s]"), np.zeros((2, 2), [("x", "f4")]), np.array("abc"), np.zeros((0, 2**16), "B"),
                     np.array([None, 1]), np.float32(1), np.ma.zeros((84, 84), "B"), memoryview(bytes(84))]),
)  # fmt: skip


@settings(CALM, max_examples=300)
@given(st.data())
def test_anything_at_all_raises_or_computes(data):
    rms = fastops.RunningMeanStd((2,))
    functions = [
        (fastops.max_pool_resize, 4), (fastops.rgb_to_gray, 2), (fastops.gae, 6),
        (fastops.discounted_sum, 4), (fastops.RunningMeanStd, 2),
        (rms.update, 1), (rms.merge, 3), (rms.normalize, 3), (rms.load_state_dict, 1),
    ]  # fmt: skip
    if fastops.BACKEND == "cython":
        functions += [(fastops._stats.sums, 1), (fastops._stats.normalize, 5), (fastops._frames.Plan, 2)]
    function, count = data.draw(st.sampled_from(functions))
    arguments = [data.draw(anything) for _ in range(count)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            function(*arguments)
        except (TypeError, ValueError):
            pass
        except (OverflowError, ZeroDivisionError, MemoryError):  # private functions may
            assert count == 2 or function.__name__ in ("sums", "normalize")

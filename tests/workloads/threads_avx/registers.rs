//! Loads every register with known values, stays in assembly until told otherwise, and stores them again.

use std::arch::asm;
use std::sync::atomic::{AtomicU32, Ordering};

use standstill_tests::workload::Pattern;

/// The widest vector registers of the cpu.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Width {
    Avx512,
    Avx,
    Sse,
}

impl Width {
    pub(crate) fn of_this_cpu() -> Self {
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") {
            Self::Avx512
        } else if is_x86_feature_detected!("avx") {
            Self::Avx
        } else {
            Self::Sse
        }
    }

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Avx512 => "cpu has AVX-512",
            Self::Avx => "cpu has AVX",
            Self::Sse => "cpu has SSE only",
        }
    }

    /// Number of registers and words in each.
    const fn vectors(self) -> (usize, usize) {
        match self {
            Self::Avx512 => (32, 8),
            Self::Avx => (16, 4),
            Self::Sse => (16, 2),
        }
    }
}

/// Words of a register file as the assembly lays it out: 32 vectors of 8 words, 8 masks, 8 general registers, MXCSR,
/// x87 control word, one x87 value.
const MASKS: usize = 256;
const GENERAL: usize = 264;
const MXCSR: usize = 272;
const X87_CONTROL: usize = 273;
const X87_VALUE: usize = 274;
const WORDS: usize = 288;

/// General registers that take part.
const GENERAL_COUNT: usize = 6;

/// Round towards zero, all exceptions masked: not the default, so that a reset shows.
const MXCSR_VALUE: u64 = 0x7f80;
/// Double precision, round towards zero, all exceptions masked: not the default either.
const X87_CONTROL_VALUE: u64 = 0x0e7f;
/// Bytes of an 80-bit x87 value that count.
const X87_BYTES: usize = 10;

/// What goes into the registers and what came out.
#[repr(C, align(64))]
struct Areas {
    load: [u64; WORDS],
    store: [u64; WORDS],
    default_mxcsr: u32,
    default_x87: u32,
    sleep: [i64; 2],
    spins: u64,
}

/// Registers of one thread.
pub(crate) struct Registers {
    width: Width,
    areas: Box<Areas>,
}

/// The assembly that is the same for all widths: general registers and floating point modes are loaded, then the thread
/// sleeps and spins until the generation in memory differs from r13d; then all of it is stored.
/// r12: areas, rbp is not touched, r15: address of the generation.
macro_rules! hold {
    ($areas:expr, $generation:expr, $seen:expr, $load:tt, $store:tt) => {
        hold!(@ $areas, $generation, $seen, $load, $store)
    };
    (@ $areas:expr, $generation:expr, $seen:expr, [$($load:expr),*], [$($store:expr),*]) => {
        asm!(
            "stmxcsr [r12 + 4608]",
            "fnstcw [r12 + 4612]",
            $($load,)*
            "ldmxcsr [r12 + 272*8]",
            "fldcw [r12 + 273*8]",
            "fldpi",
            "mov rdx, [r12 + 264*8]",
            "mov r8, [r12 + 265*8]",
            "mov r9, [r12 + 266*8]",
            "mov r10, [r12 + 267*8]",
            "mov r14, [r12 + 268*8]",
            "std",
            "2:",
            "mov rcx, [r12 + 4632]",
            "test rcx, rcx",
            "jz 4f",
            "3:",
            "pause",
            "dec rcx",
            "jnz 3b",
            "4:",
            "mov eax, 35",
            "lea rdi, [r12 + 4616]",
            "xor esi, esi",
            "syscall",
            "cmp dword ptr [r15], r13d",
            "je 2b",
            // The direction flag is part of the state as well; it is kept with the last general register.
            "pushfq",
            "pop rax",
            "cld",
            "and eax, 0x400",
            "mov [r12 + 2304 + 269*8], rax",
            "mov [r12 + 2304 + 264*8], rdx",
            "mov [r12 + 2304 + 265*8], r8",
            "mov [r12 + 2304 + 266*8], r9",
            "mov [r12 + 2304 + 267*8], r10",
            "mov [r12 + 2304 + 268*8], r14",
            "fstp tbyte ptr [r12 + 2304 + 274*8]",
            "fnstcw [r12 + 2304 + 273*8]",
            "stmxcsr [r12 + 2304 + 272*8]",
            $($store,)*
            "fldcw [r12 + 4612]",
            "ldmxcsr [r12 + 4608]",
            in("r12") $areas,
            in("r13") $seen,
            in("r15") $generation,
            out("r14") _,
            clobber_abi("sysv64"),
        )
    };
}

/// One line of assembly per register: `vector!("vmovdqu64 zmm", load, 0 1 2 …)`.
macro_rules! lines {
    ($areas:expr, $generation:expr, $seen:expr, $move:literal, $register:literal, [$($v:literal)*], [$($k:literal)*], $tail:literal) => {
        hold!(
            $areas, $generation, $seen,
            [
                $(concat!($move, " ", $register, $v, ", [r12 + 64*", $v, "]"),)*
                $(concat!("kmovq k", $k, ", [r12 + 2048 + 8*", $k, "]"),)*
                $tail
            ],
            [
                $(concat!($move, " [r12 + 2304 + 64*", $v, "], ", $register, $v),)*
                $(concat!("kmovq [r12 + 2304 + 2048 + 8*", $k, "], k", $k),)*
                $tail
            ]
        )
    };
}

impl Registers {
    /// Registers that sleep 5 ms at a time and spin `spins` times in between.
    pub(crate) fn new(width: Width, spins: u64) -> Self {
        let sleep = if spins == 0 { 5_000_000 } else { 20_000_000 };
        let areas =
            Areas { load: [0; WORDS], store: [0; WORDS], default_mxcsr: 0, default_x87: 0, sleep: [0, sleep], spins };
        Self { width, areas: Box::new(areas) }
    }

    /// Holds the values of a pattern until `generation` changes.
    pub(crate) fn hold(&mut self, pattern: Pattern, generation: &AtomicU32) {
        pattern.fill(&mut self.areas.load[..GENERAL + GENERAL_COUNT - 1], 0);
        self.areas.load[GENERAL + GENERAL_COUNT - 1] = 0x400;
        self.areas.load[MXCSR] = MXCSR_VALUE;
        self.areas.load[X87_CONTROL] = X87_CONTROL_VALUE;
        self.areas.store = [0; WORDS];
        let seen = u64::from(generation.load(Ordering::Relaxed));
        let (areas, generation) = (&raw mut *self.areas, generation.as_ptr());
        match self.width {
            // SAFETY: the cpu has AVX-512F and BW. The assembly accesses only the areas (layout checked below) and reads
            // the generation; it restores MXCSR, the x87 control word and the direction flag, balances the x87 stack,
            // and declares every register it changes.
            Width::Avx512 => unsafe {
                lines!(areas, generation, seen, "vmovdqu64", "zmm",
                    [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31],
                    [0 1 2 3 4 5 6 7], "nop");
            },
            // SAFETY: as above, with AVX.
            Width::Avx => unsafe {
                lines!(areas, generation, seen, "vmovdqu", "ymm", [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15], [], "nop");
            },
            // SAFETY: as above, with SSE, which every x86_64 cpu has.
            Width::Sse => unsafe {
                lines!(areas, generation, seen, "movdqu", "xmm", [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15], [], "nop");
            },
        }
    }

    /// Says which registers did not keep their value.
    pub(crate) fn wrong(&self) -> Vec<String> {
        let Areas { load, store, .. } = &*self.areas;
        let (count, words) = self.width.vectors();
        let mut wrong = Vec::new();
        let mut compare = |name: String, is: &[u64], was: &[u64]| {
            if is != was {
                wrong.push(format!("{name} is {is:x?}, was {was:x?}"));
            }
        };
        for vector in 0..count {
            let range = vector * 8..vector * 8 + words;
            compare(format!("vector register {vector}"), &store[range.clone()], &load[range]);
        }
        if self.width == Width::Avx512 {
            compare("mask registers".to_owned(), &store[MASKS..GENERAL], &load[MASKS..GENERAL]);
        }
        let general = GENERAL..GENERAL + GENERAL_COUNT;
        compare("general registers".to_owned(), &store[general.clone()], &load[general]);
        compare("MXCSR".to_owned(), &[store[MXCSR] & 0xffff_ffc0], &[MXCSR_VALUE]);
        compare("x87 control word".to_owned(), &[store[X87_CONTROL] & 0xffff], &[X87_CONTROL_VALUE]);
        let value: Vec<u8> = store[X87_VALUE..].iter().flat_map(|word| word.to_le_bytes()).take(X87_BYTES).collect();
        if value != PI_ROUNDED_TO_ZERO {
            wrong.push(format!("x87 register is {value:x?}"));
        }
        wrong
    }
}

/// What `fldpi` loads when rounding towards zero.
const PI_ROUNDED_TO_ZERO: [u8; X87_BYTES] = [0x34, 0xc2, 0x68, 0x21, 0xa2, 0xda, 0x0f, 0xc9, 0x00, 0x40];

// The assembly knows these offsets by number.
const _: () = {
    assert!(std::mem::offset_of!(Areas, store) == 2304);
    assert!(std::mem::offset_of!(Areas, default_mxcsr) == 4608);
    assert!(std::mem::offset_of!(Areas, default_x87) == 4612);
    assert!(std::mem::offset_of!(Areas, sleep) == 4616);
    assert!(std::mem::offset_of!(Areas, spins) == 4632);
    assert!(MASKS * 8 == 2048 && GENERAL == 264 && MXCSR == 272 && X87_CONTROL == 273 && X87_VALUE == 274);
};

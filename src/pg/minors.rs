//! Minor versions whose logical decoding has bugs that a relay meets, by PostgreSQL's release notes. Pure.
//!
//! The trap: a bug is fixed in several branches on one day, and a branch that came later was never without the fix.

/// A bug, and the first sound minor version of each major one that had it.
struct Bug {
    what: &'static str,
    /// `server_version_num`.
    begins: &'static [(i32, i32)],
    sound: &'static [i32],
}

const BUGS: [Bug; 5] = [
    Bug {
        what: "the slot's restart position can go back, and WAL that it needs can be removed",
        begins: &[],
        sound: &[140_015, 150_010, 160_006, 170_002],
    },
    Bug {
        what: "rows can be lost when a publication is altered while transactions run",
        begins: &[],
        sound: &[140_018, 150_013, 160_009, 170_005],
    },
    Bug {
        what: "each change of a table makes every open transaction larger, without a limit",
        begins: &[(140_018, 140_018), (150_013, 150_013), (160_009, 160_009), (170_005, 170_005)],
        sound: &[],
    },
    Bug {
        what: "WAL that a slot needs can be removed at a checkpoint, and the slot's position can go back",
        begins: &[],
        sound: &[140_019, 150_014, 160_010, 170_006],
    },
    Bug {
        what: "a slot can be invalid as soon as it is made",
        begins: &[],
        sound: &[140_021, 150_016, 160_012, 170_008, 180_002],
    },
];

impl Bug {
    fn is_in(&self, version: i32) -> bool {
        let same_major = |other: i32| other / 10_000 == version / 10_000;
        self.begins.iter().any(|(first, last)| (*first..=*last).contains(&version))
            || self.sound.iter().any(|sound| same_major(*sound) && version < *sound)
    }
}

/// What is wrong with this one.
pub(super) fn faults(version: i32) -> impl Iterator<Item = &'static str> {
    BUGS.iter().filter(move |bug| bug.is_in(version)).map(|bug| bug.what)
}

/// The first of the same major version without any of these.
pub(super) fn sound(version: i32) -> i32 {
    (version..version + 100).find(|version| faults(*version).next().is_none()).unwrap_or(version)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_minor_has_the_bugs_that_later_ones_mended() {
        assert_eq!(faults(150_009).count(), 4);
        assert_eq!(faults(150_013).count(), 3, "two mended, one begun");
        assert_eq!(faults(170_005).count(), 3);
        assert_eq!(faults(180_001).count(), 1);
        for version in [140_023, 150_018, 160_014, 170_010, 180_004, 190_000] {
            assert_eq!(faults(version).count(), 0, "{version}");
        }
    }

    #[test]
    fn the_version_to_update_to_is_the_first_sound_one_of_the_same_major() {
        assert_eq!(sound(150_003), 150_016);
        assert_eq!(sound(180_000), 180_002);
    }
}

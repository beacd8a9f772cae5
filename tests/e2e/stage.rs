//! Worlds as the tests need them.

use std::sync::{Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use narrows_lab::{Layout, Limits, Profile, ServerSpec, SidecarSpec, Vouched, World, scenario::accounts};

/// Held for writing by a test that measures, or that nothing may disturb; for reading by all others.
static COMPANY: RwLock<()> = RwLock::new(());

/// Four servers starting at once would time out on two cores.
static STARTING: Mutex<()> = Mutex::new(());

/// A world, and the right to be the only one.
pub struct Stand {
    pub world: World,
    _alone: RwLockWriteGuard<'static, ()>,
}

/// The pair between two servers.
pub fn pair() -> Layout {
    pair_with(&[])
}

/// The pair, with lines added to sections of both configurations.
pub fn pair_with(settings: &[(&str, &str)]) -> Layout {
    let spec = SidecarSpec::new(env!("CARGO_BIN_EXE_narrows"));
    Layout::Sidecar(
        settings
            .iter()
            .fold(spec, |spec, (section, line)| spec.yaml(section, line)),
    )
}

/// A world that stands alone.
pub fn stand(name: &str, profile: Profile, a: ServerSpec, b: ServerSpec, crowd: usize, layout: Layout) -> Stand {
    let alone = COMPANY.write().unwrap_or_else(PoisonError::into_inner);
    let world = world(name, profile, a, b, crowd, layout);
    Stand { world, _alone: alone }
}

/// As [`stand`], with servers' certificates as they are said to be. Otherwise those behind sidecars are as Debian's packages make them,
/// vouched for by nobody, and the servers prove themselves by dialback; over plain S2S Prosody needs the lab to vouch.
pub fn stand_vouched(
    name: &str,
    profile: Profile,
    a: ServerSpec,
    b: ServerSpec,
    crowd: usize,
    layout: Layout,
    vouched: Vouched,
) -> Stand {
    let alone = COMPANY.write().unwrap_or_else(PoisonError::into_inner);
    let world = world_vouched(name, profile, a, b, crowd, layout, Some(vouched));
    Stand { world, _alone: alone }
}

/// For tests that mostly wait for one answer after the other: others of this kind may play at the same time. To be taken
/// once in a test, before its worlds.
pub fn in_company() -> RwLockReadGuard<'static, ()> {
    COMPANY.read().unwrap_or_else(PoisonError::into_inner)
}

/// A world; the caller has the right to it.
pub fn world(name: &str, profile: Profile, a: ServerSpec, b: ServerSpec, crowd: usize, layout: Layout) -> World {
    world_vouched(name, profile, a, b, crowd, layout, None)
}

fn world_vouched(
    name: &str,
    profile: Profile,
    a: ServerSpec,
    b: ServerSpec,
    crowd: usize,
    layout: Layout,
    vouched: Option<Vouched>,
) -> World {
    let _one_at_a_time = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
    let builder = World::builder(name)
        .link(profile)
        .site_a(a.limits(Limits::ServersOnly))
        .site_b(b.limits(Limits::ServersOnly))
        .users_a(accounts(crowd))
        .users_b(accounts(crowd))
        .layout(layout);
    let builder = match vouched {
        Some(vouched) => builder.certificates(vouched),
        None => builder,
    };
    builder
        .start()
        .unwrap_or_else(|error| panic!("the world {name} does not start: {error}"))
}

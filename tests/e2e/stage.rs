//! Worlds as the tests need them.

use std::sync::{Mutex, MutexGuard, PoisonError};

use narrows_lab::{Layout, Limits, Profile, ServerSpec, SidecarSpec, Vouched, World, scenario::accounts};

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// A world, and the right to have one.
pub struct Stand {
    pub world: World,
    _alone: MutexGuard<'static, ()>,
}

/// The pair between two servers.
pub fn pair() -> Layout {
    Layout::Sidecar(SidecarSpec::new(env!("CARGO_BIN_EXE_narrows")))
}

pub fn stand(name: &str, profile: Profile, a: ServerSpec, b: ServerSpec, crowd: usize, layout: Layout) -> Stand {
    stand_vouched(name, profile, a, b, crowd, layout, Vouched::ByNobody)
}

/// With servers' certificates as they are said to be. Behind sidecars those of Debian's packages are vouched for by nobody, and the servers
/// prove themselves by dialback.
pub fn stand_vouched(
    name: &str,
    profile: Profile,
    a: ServerSpec,
    b: ServerSpec,
    crowd: usize,
    layout: Layout,
    vouched: Vouched,
) -> Stand {
    let alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let world = World::builder(name)
        .link(profile)
        .site_a(a.limits(Limits::ServersOnly))
        .site_b(b.limits(Limits::ServersOnly))
        .users_a(accounts(crowd))
        .users_b(accounts(crowd))
        .layout(layout)
        .certificates(vouched)
        .start()
        .expect("the world starts");
    Stand { world, _alone: alone }
}

/// What both sites say for themselves, for the message of a failed test.
pub fn words(world: &World) -> String {
    let site = |site: &narrows_lab::Site| {
        let status = site
            .sidecar()
            .http("/status")
            .map_or_else(|error| error.to_string(), |(_, body)| body);
        format!("{status}\n{}\n", site.log_tails())
    };
    format!("{}{}", site(&world.a), site(&world.b))
}

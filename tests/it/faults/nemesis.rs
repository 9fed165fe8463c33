//! Faults drawn from a seed, one after the other, some at once, while the load goes on.
//!
//! The trap: faults that never meet. Two different ones overlap in a third of the cases, on both sides of the relay.

use std::time::Duration;

use super::acts::Side;
use super::allow;
use super::arena::Round;
use super::judge::Allowed;
use crate::support::links::Toxics;

/// Faults in one round.
const FAULTS: usize = 8;

/// A relay that is killed soon after Postgres was sends again what came since Postgres last saved the slot.
pub(super) const ALLOWED: Allowed = allow(usize::MAX);

/// One round's worth.
pub(super) async fn strike(round: &mut Round) {
    for _ in 0..FAULTS {
        let long = Duration::from_millis(round.random.u64(10..5_000));
        let other = other_side(round);
        if let Some((side, toxics)) = &other {
            round.link(*side).set(toxics.clone());
        }
        let number = round.random.u8(0..20);
        round.logs += &format!("--- fault {number} for {long:?}, {other:?}\n");
        fault(round, number, long).await;
        if let Some((side, _)) = other {
            round.link(side).heal();
        }
        if round.random.bool() {
            round.flowing(1).await;
        }
    }
}

/// Something on a link that only slows or cuts, under the fault.
fn other_side(round: &mut Round) -> Option<(Side, Toxics)> {
    let side = if round.random.bool() { Side::Postgres } else { Side::RabbitMq };
    let toxics = match round.random.u8(0..12) {
        0 => Toxics { latency: Duration::from_millis(round.random.u64(1..200)), ..Toxics::default() },
        1 => Toxics { slice: Some(round.random.usize(1..50)), ..Toxics::default() },
        2 => Toxics { bandwidth_down: Some(200 << 10), bandwidth_up: Some(200 << 10), ..Toxics::default() },
        3 => Toxics { reset_after: Some(round.random.u64(1..100_000)), ..Toxics::default() },
        _ => return None,
    };
    Some((side, toxics))
}

async fn fault(round: &mut Round, number: u8, long: Duration) {
    let hole = Toxics {
        black_hole_up: !long.subsec_millis().is_multiple_of(3),
        black_hole_down: long.subsec_millis() % 3 != 1,
        ..Toxics::default()
    };
    let (confirm, status) = (round.random.u64(1..30), round.random.u64(1..5));
    match number {
        0 | 1 => round.kill_relay().await,
        2 => round.restart_relay().await,
        3 => round.freeze_relay(long).await,
        4 => round.kill_postgres().await,
        5 => round.restart_postgres("fast").await,
        6 => round.restart_postgres("immediate").await,
        7 => round.terminate_walsender().await,
        8 => round.toxic(Side::Postgres, hole, long).await,
        9 => round.toxic(Side::RabbitMq, hole, long).await,
        10 => round.cut(Side::Postgres).await,
        11 => round.cut(Side::RabbitMq).await,
        12 => {
            round.toxic(Side::RabbitMq, Toxics { cut_before_confirm: Some(confirm), ..Toxics::default() }, long).await
        }
        13 => round.toxic(Side::Postgres, Toxics { cut_before_status: Some(status), ..Toxics::default() }, long).await,
        14 => round.toxic(Side::RabbitMq, Toxics { hold_confirms: true, ..Toxics::default() }, long).await,
        15 => {
            round.take_relay().kill();
            round.kill_postgres().await;
            round.start_relay();
        }
        16 => {
            round.site.rabbitmq.freeze().unwrap();
            tokio::time::sleep(long).await;
            round.site.rabbitmq.thaw().unwrap();
        }
        17 => round.kill_broker(Duration::ZERO).await,
        18 => round.close_all_connections().await,
        _ => {
            round.site.rabbitmq.ctl(&["set_vm_memory_high_watermark", "0.000001"]).unwrap();
            tokio::time::sleep(long).await;
            round.site.rabbitmq.ctl(&["set_vm_memory_high_watermark", "absolute", "1GB"]).unwrap();
        }
    }
}

//! Reads blocks of the input, at most a window of epochs ahead of what is durable.
//!
//! ```text
//! reader thread ─▶ bounded queue ─▶ [ one capability, at the next epoch ] ─▶ chains, accounts at epoch
//!                                      epoch beyond the credit: wait
//! ```
//!
//! One worker reads; the chains are dealt out behind it. The capability is moved to the next epoch before
//! anything is waited for, so that what was sent can complete.

use crate::credit::Credit;
use crate::waker;
use crossbeam_channel::{Receiver, TryRecvError, bounded};
use headwater::block::{Block, Blocks};
use headwater::chain::{Chain, chains};
use headwater::format::documents::InputPosition;
use headwater::ledger::Ledger;
use headwater::meter::Meters;
use headwater::record::Rejected;
use headwater::synthesizer::Waker;
use serde::{Deserialize, Serialize};
use std::rc::Rc;
use std::sync::Arc;
use timely::dataflow::operators::generic::operator::source;
use timely::dataflow::{Scope, StreamVec};

/// Blocks that are read before they are asked for.
const BLOCKS_AHEAD: usize = 2;

/// What the source sends for an epoch.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Admitted {
    /// A chain of texts.
    Chain(Chain),
    /// What else the block says.
    Account(Account),
}

/// What a block says beside its texts.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Account {
    /// What could not be used.
    pub rejected: Vec<Rejected>,
    /// What was counted.
    pub ledger: Ledger,
    /// How far the input has been read.
    pub input: InputPosition,
}

/// How the source cuts and counts.
#[derive(Clone, Debug)]
pub struct Reading {
    /// Rounds of a chain.
    pub rounds: usize,
    /// The first epoch.
    pub first_epoch: u64,
    /// Where progress is noted.
    pub meters: Arc<Meters>,
}

/// A stream of the chains of each block, with its account. Workers without `blocks` send nothing.
pub fn read<'scope>(
    scope: Scope<'scope, u64>,
    blocks: Option<Blocks>,
    credit: Rc<Credit>,
    reading: Reading,
) -> StreamVec<'scope, u64, Admitted> {
    source(scope, "Read", move |capability, info| {
        credit.wake(scope.activator_for(info.address.clone()));
        let wake = waker(scope.worker().sync_activator_for(info.address.to_vec()));
        let blocks = blocks.map(|blocks| read_ahead(blocks, wake));
        // Held while there is more to send, at the epoch of what comes next.
        let mut capability = blocks.is_some().then_some(capability);
        let mut epoch = reading.first_epoch;

        move |output| {
            while let (Some(held), Some(blocks)) = (&mut capability, &blocks) {
                held.downgrade(&epoch);
                if credit.is_closed() {
                    capability = None;
                    return;
                }
                if !credit.allows(epoch) {
                    return;
                }
                match blocks.try_recv() {
                    Ok(block) => {
                        assert_eq!(block.epoch, epoch, "blocks come in order");
                        let mut session = output.session(&*held);
                        session.give_iterator(admitted(block, &reading));
                        epoch += 1;
                    }
                    Err(TryRecvError::Empty) => return,
                    Err(TryRecvError::Disconnected) => capability = None,
                }
            }
        }
    })
}

fn admitted(block: Block, reading: &Reading) -> impl Iterator<Item = Admitted> {
    let Block { epoch: _, documents, rejected, ledger, end } = block;
    reading.meters.records.add(ledger.get("read/records"));
    reading.meters.texts.add(documents.len() as u64);
    let account = Account { rejected, ledger, input: end };
    let chains = chains(documents, reading.rounds).into_iter().map(Admitted::Chain);
    std::iter::once(Admitted::Account(account)).chain(chains)
}

/// Reads on a thread of its own; the receiver is disconnected behind the last block.
fn read_ahead(blocks: Blocks, wake: Waker) -> Receiver<Block> {
    let (send, receive) = bounded(BLOCKS_AHEAD);
    std::thread::Builder::new()
        .name("reader".into())
        .spawn(move || {
            for block in blocks {
                if send.send(block).is_err() {
                    return; // the run is over
                }
                wake();
            }
            drop(send);
            wake();
        })
        .expect("the system gives a run its few threads");
    receive
}

//! Commits each epoch when all of it is there.
//!
//! ```text
//! packed lanes at t ┐
//!                   ├─▶ [ until t closes on both sides ] ─▶ commit thread ─▶ committed epoch at t
//! accounts at t ────┘     epochs leave in order
//! ```
//!
//! One worker commits. The capability of an epoch is held until its line is in the manifest.

use crate::pack::PackedLane;
use crate::read::Account;
use crate::waker;
use headwater::commit::{Committed, Committer};
use headwater::manifest::{EpochOutput, LaneState};
use headwater::meter::Meters;
use headwater::synthesizer::Waker;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use timely::dataflow::StreamVec;
use timely::dataflow::channels::pact::Exchange;
use timely::dataflow::operators::{Capability, Operator};

/// How long an epoch stays here before the commit thread is tried again.
const RETRY: Duration = Duration::from_millis(5);

/// Where epochs go on from.
#[derive(Clone, Debug)]
pub struct Committing {
    /// How far each lane has come.
    pub lanes: Vec<LaneState>,
    /// Where progress is noted.
    pub meters: Arc<Meters>,
}

/// Provides `commit`.
pub trait Commit<'scope> {
    /// Commits each epoch with the account of its block. `open` gives the committing worker its thread.
    fn commit(
        self,
        accounts: StreamVec<'scope, u64, Account>,
        committing: Committing,
        open: impl FnOnce(Waker) -> Committer + 'static,
    ) -> StreamVec<'scope, u64, Committed>;
}

impl<'scope> Commit<'scope> for StreamVec<'scope, u64, PackedLane> {
    fn commit(
        self,
        accounts: StreamVec<'scope, u64, Account>,
        committing: Committing,
        open: impl FnOnce(Waker) -> Committer + 'static,
    ) -> StreamVec<'scope, u64, Committed> {
        let scope = self.scope();
        let (to_one, accounts_to_one) =
            (Exchange::new(|_: &PackedLane| 0), Exchange::new(|_: &Account| 0));
        self.binary_frontier(
            accounts,
            to_one,
            accounts_to_one,
            "Commit",
            move |_capability, info| {
                let wake = waker(scope.worker().sync_activator_for(info.address.to_vec()));
                let again = scope.activator_for(info.address);
                let committer = (scope.index() == 0).then(|| open(wake));
                let mut epochs = Epochs::new(committing.lanes);

                move |(packed, packed_frontier), (accounts, accounts_frontier), output| {
                    let port = output.output_index();
                    packed.for_each_stamp(|capability, batches| {
                        let held = capability.retain_least(port).expect("packed at a time");
                        let lanes = &mut epochs.gathered(held).lanes;
                        lanes.extend(batches.flat_map(|batch| batch.drain(..)));
                    });
                    accounts.for_each_stamp(|capability, batches| {
                        let held = capability.retain_least(port).expect("accounts have a time");
                        let accounts = &mut epochs.gathered(held).accounts;
                        accounts.extend(batches.flat_map(|batch| batch.drain(..)));
                    });
                    let Some(committer) = &committer else { return };
                    let is_whole = |epoch: &u64| {
                        !packed_frontier.less_equal(epoch) && !accounts_frontier.less_equal(epoch)
                    };
                    if !epochs.hand_over(committer, is_whole) {
                        again.activate_after(RETRY);
                    }
                    while let Some(committed) = committer.poll() {
                        let epoch = committed.record.epoch;
                        let capability =
                            epochs.handed_over.remove(&epoch).expect("handed over before");
                        committing.meters.epochs.add(1);
                        committing.meters.sequences.add(committed.record.sequences);
                        output.session(&capability).give(committed);
                    }
                }
            },
        )
    }
}

/// The epochs of a run on their way to the disk, each with its capability.
struct Epochs {
    lanes: Vec<LaneState>,
    gathering: BTreeMap<u64, (Capability<u64>, Gathered)>,
    handed_over: BTreeMap<u64, Capability<u64>>,
    /// Behind an epoch that the run ends with, nothing is committed any more.
    stopped: bool,
}

impl Epochs {
    fn new(lanes: Vec<LaneState>) -> Self {
        let stopped = lanes.iter().any(|lane| lane.stopped);
        Epochs { lanes, gathering: BTreeMap::new(), handed_over: BTreeMap::new(), stopped }
    }

    /// What has come of the epoch of a capability.
    fn gathered(&mut self, held: Capability<u64>) -> &mut Gathered {
        let epoch = *held.time();
        &mut self.gathering.entry(epoch).or_insert_with(|| (held, Gathered::default())).1
    }

    /// Hands over the epochs that are whole, in their order; whether there was room for all of them.
    fn hand_over(&mut self, committer: &Committer, is_whole: impl Fn(&u64) -> bool) -> bool {
        while let Some(entry) = self.gathering.first_entry()
            && is_whole(entry.key())
        {
            let epoch = *entry.key();
            let (capability, gathered) = entry.remove();
            if self.stopped {
                continue;
            }
            match committer.offer(gathered.into_output(epoch, &mut self.lanes)) {
                Ok(()) => {
                    self.stopped = self.lanes.iter().any(|lane| lane.stopped);
                    self.handed_over.insert(epoch, capability);
                }
                Err(whole) => {
                    let gathered = Gathered { whole: Some(whole), ..Gathered::default() };
                    self.gathering.insert(epoch, (capability, gathered));
                    return false;
                }
            }
        }
        true
    }
}

/// What has come of an epoch so far.
#[derive(Default)]
struct Gathered {
    lanes: Vec<PackedLane>,
    accounts: Vec<Account>,
    /// The whole epoch, if it has been put together and waits for the commit thread.
    whole: Option<Box<EpochOutput>>,
}

impl Gathered {
    /// The epoch as it is committed. Lanes that had nothing to do keep their state.
    fn into_output(self, epoch: u64, states: &mut [LaneState]) -> Box<EpochOutput> {
        if let Some(whole) = self.whole {
            return whole;
        }
        let mut output = Box::new(EpochOutput { epoch, ..EpochOutput::default() });
        let mut lanes: BTreeMap<u64, PackedLane> =
            self.lanes.into_iter().map(|lane| (lane.lane, lane)).collect();
        let mut documents = Vec::new();
        for (index, state) in states.iter_mut().enumerate() {
            let Some(lane) = lanes.remove(&(index as u64)) else {
                output.lanes.push((state.clone(), Vec::new()));
                continue;
            };
            documents.push(lane.documents);
            output.rejected.extend(lane.rejected);
            output.ledger.merge(&lane.ledger);
            state.clone_from(&lane.state);
            output.lanes.push((lane.state, lane.sequences));
        }
        output.augmented = documents.into_iter().flatten().collect();
        for account in self.accounts {
            output.rejected.extend(account.rejected);
            output.ledger.merge(&account.ledger);
            output.input = account.input;
        }
        output
    }
}

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
                let mut lanes = committing.lanes;
                // The epochs that are being gathered, and those handed over: each with its capability.
                let mut gathering: BTreeMap<u64, (Capability<u64>, Gathered)> = BTreeMap::new();
                let mut handed_over: BTreeMap<u64, Capability<u64>> = BTreeMap::new();
                // Behind an epoch that the run ends with, nothing is committed any more.
                let mut stopped = lanes.iter().any(|lane| lane.stopped);

                move |(packed, packed_frontier), (accounts, accounts_frontier), output| {
                    let port = output.output_index();
                    packed.for_each_stamp(|capability, batches| {
                        let held = capability.retain_least(port).expect("packed at a time");
                        let (_, gathered) = gathering
                            .entry(*held.time())
                            .or_insert_with(|| (held, Gathered::default()));
                        gathered.lanes.extend(batches.flat_map(|batch| batch.drain(..)));
                    });
                    accounts.for_each_stamp(|capability, batches| {
                        let held = capability.retain_least(port).expect("accounts have a time");
                        let (_, gathered) = gathering
                            .entry(*held.time())
                            .or_insert_with(|| (held, Gathered::default()));
                        gathered.accounts.extend(batches.flat_map(|batch| batch.drain(..)));
                    });
                    let Some(committer) = &committer else { return };
                    while let Some(entry) = gathering.first_entry()
                        && !packed_frontier.less_equal(entry.key())
                        && !accounts_frontier.less_equal(entry.key())
                    {
                        let epoch = *entry.key();
                        let (capability, gathered) = entry.remove();
                        if stopped {
                            continue;
                        }
                        let whole = gathered.into_output(epoch, &mut lanes);
                        match committer.offer(whole) {
                            Ok(()) => {
                                stopped = lanes.iter().any(|lane| lane.stopped);
                                handed_over.insert(epoch, capability);
                            }
                            Err(whole) => {
                                let gathered =
                                    Gathered { whole: Some(whole), ..Gathered::default() };
                                gathering.insert(epoch, (capability, gathered));
                                again.activate_after(RETRY);
                                break;
                            }
                        }
                    }
                    while let Some(committed) = committer.poll() {
                        let epoch = committed.record.epoch;
                        let capability = handed_over.remove(&epoch).expect("handed over before");
                        committing.meters.epochs.add(1);
                        committing.meters.sequences.add(committed.record.sequences);
                        output.session(&capability).give(committed);
                    }
                }
            },
        )
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

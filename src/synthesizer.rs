//! The seam between the dataflow and whatever generates text.
//!
//! ```text
//! operator ── submit(Request) ─▶ queue ─▶ engine thread ─▶ Completion ── poll() ─▶ operator
//! ```
//!
//! A worker never blocks: a full queue hands the request back, and finished requests are fetched when the
//! waker says so. The answer to a request is a function of its tokens and limits alone, whatever else is
//! in flight, in whatever order answers come, and whichever of several equal engines gives it.

use crate::engine::router::route;
use crate::record::Finish;
use crossbeam_channel::{Receiver, Sender, TrySendError, bounded, unbounded};
use std::collections::BTreeSet;
use std::sync::Arc;

/// What is to be generated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Chosen by the caller, to recognise the answer.
    pub key: u64,
    /// The prompt.
    pub tokens: Vec<u32>,
    /// Tokens to generate at most.
    pub new_tokens_max: usize,
}

/// What was generated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The key of the request.
    pub key: u64,
    /// The generated tokens, without the one that ended the generation.
    pub tokens: Vec<u32>,
    /// How it ended.
    pub finish: Finish,
}

/// Generates text, for one caller.
pub trait Synthesizer {
    /// Takes a request, or hands it back if there is no room for it now. There may be room for another.
    ///
    /// # Panics
    /// If the engine is gone: the run cannot go on.
    fn submit(&mut self, request: Request) -> Result<(), Request>;

    /// A finished request, if there is one.
    fn poll(&mut self) -> Option<Completion>;
}

/// Called from the engine's thread whenever a completion has become ready.
pub type Waker = Arc<dyn Fn() + Send + Sync>;

/// A request with its way back.
pub struct Job {
    /// What is to be generated.
    pub request: Request,
    reply: Sender<Completion>,
    waker: Waker,
}

impl Job {
    /// Sends the answer back. A caller that is gone is no error.
    pub fn complete(self, tokens: Vec<u32>, finish: Finish) {
        let _ = self.reply.send(Completion { key: self.request.key, tokens, finish });
        (self.waker)();
    }
}

/// The queue in front of an engine, or of several equal ones: clone it for each caller.
#[derive(Clone)]
pub struct Queue {
    engines: Vec<Sender<Job>>,
}

impl Queue {
    /// A queue of at most `capacity` waiting requests, and the end that an engine takes them from.
    pub fn new(capacity: usize) -> (Self, Receiver<Job>) {
        let (jobs, receiver) = bounded(capacity);
        (Queue { engines: vec![jobs] }, receiver)
    }

    /// One queue in front of all the engines of several. The engines must give equal answers.
    ///
    /// # Panics
    /// If there are none.
    pub fn over(queues: impl IntoIterator<Item = Queue>) -> Self {
        let engines: Vec<_> = queues.into_iter().flat_map(|queue| queue.engines).collect();
        assert!(!engines.is_empty(), "somebody must answer");
        Queue { engines }
    }

    /// A handle for one caller, who is woken by `waker`.
    pub fn open(&self, waker: Waker) -> Handle {
        let (reply, completions) = unbounded(); // holds what was submitted, which is bounded
        Handle { engines: self.engines.clone(), reply, completions, waker }
    }
}

/// One caller's end of a [`Queue`].
pub struct Handle {
    engines: Vec<Sender<Job>>,
    reply: Sender<Completion>,
    completions: Receiver<Completion>,
    waker: Waker,
}

impl Synthesizer for Handle {
    fn submit(&mut self, request: Request) -> Result<(), Request> {
        let engine = route(&request.tokens, &self.engines);
        let job = Job { request, reply: self.reply.clone(), waker: self.waker.clone() };
        match self.engines[engine].try_send(job) {
            Ok(()) => Ok(()),
            Err(TrySendError::Full(job)) => Err(job.request),
            Err(TrySendError::Disconnected(_)) => panic!("the synthesis engine is gone"),
        }
    }

    fn poll(&mut self) -> Option<Completion> {
        self.completions.try_recv().ok()
    }
}

/// Answers every request with a function of its tokens: for tests of everything around the engine.
///
/// Answers come back in an order that depends on `disorder`, so that nothing can rely on one.
pub fn scripted(
    receiver: Receiver<Job>,
    disorder: u64,
    answer: impl Fn(&Request) -> (Vec<u32>, Finish) + Send + 'static,
) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        let mut stream = crate::seed::stream(disorder, "scripted", "order");
        let mut held: Vec<Job> = Vec::new();
        let mut open = true;
        while open || !held.is_empty() {
            match held.is_empty() {
                true => match receiver.recv() {
                    Ok(job) => held.push(job),
                    Err(_) => open = false,
                },
                false => held.extend(receiver.try_iter().take(16)),
            }
            if !held.is_empty() {
                let job = held.swap_remove(stream.index(held.len()));
                let (tokens, finish) = answer(&job.request);
                job.complete(tokens, finish);
            }
        }
    })
}

/// Requests in flight, by key: catches an engine that answers twice or answers what was never asked.
#[derive(Debug, Default)]
pub struct InFlight {
    keys: BTreeSet<u64>,
    next: u64,
}

impl InFlight {
    /// A fresh key.
    pub fn issue(&mut self) -> u64 {
        self.next += 1;
        self.keys.insert(self.next);
        self.next
    }

    /// Takes back the key of an answer.
    ///
    /// # Panics
    /// If it was not issued, or taken back before.
    pub fn settle(&mut self, key: u64) {
        assert!(self.keys.remove(&key), "an answer to request {key} that is not in flight");
    }

    /// Number of requests in flight.
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// Whether nothing is in flight.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_request_is_answered_once_in_whatever_order() {
        for disorder in 0..5 {
            let (queue, receiver) = Queue::new(4);
            let engine = scripted(receiver, disorder, |request| {
                (request.tokens.iter().map(|token| token + 1).collect(), Finish::Stop)
            });
            let (woken, wakes) = unbounded();
            let mut handle = queue.open(Arc::new(move || {
                let _ = woken.send(());
            }));
            drop(queue);
            let mut in_flight = InFlight::default();
            let (mut sent, mut answers) = (0u32, BTreeSet::new());
            while answers.len() < 50 {
                while sent < 50 {
                    let tokens = vec![sent];
                    let request = Request { key: in_flight.issue(), tokens, new_tokens_max: 1 };
                    match handle.submit(request) {
                        Ok(()) => sent += 1,
                        Err(request) => {
                            in_flight.settle(request.key);
                            break;
                        }
                    }
                }
                wakes.recv().unwrap();
                while let Some(completion) = handle.poll() {
                    in_flight.settle(completion.key);
                    assert!(answers.insert(completion.tokens[0]));
                }
            }
            assert_eq!(answers, (1..=50).collect());
            assert!(in_flight.is_empty());
            drop(handle);
            engine.join().unwrap();
        }
    }

    #[test]
    #[should_panic(expected = "the synthesis engine is gone")]
    fn an_engine_that_is_gone_stops_the_run() {
        let (queue, receiver) = Queue::new(4);
        let mut handle = queue.open(Arc::new(|| {}));
        drop(receiver);
        let _ = handle.submit(Request { key: 1, tokens: vec![1], new_tokens_max: 1 });
    }
}

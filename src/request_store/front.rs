//! The thread between callers and engines that answers from the store.
//!
//! ```text
//! queue ─▶ known? ── yes ─▶ answered
//!            └ no ─▶ backlog ─▶ queue of the engines ─▶ completions ─▶ store, one sync for all ─▶ answered
//!                       └─ an equal request waits for the same answer ─┘
//! ```
//!
//! An answer leaves when it is on the disk, so that what callers have seen is there after a crash. A full
//! engine leaves requests in the backlog, all of which are tried again: one engine does not stand in the way of
//! the others. The backlog and what waits are bounded; beyond that the queue fills up, and callers keep theirs.

use super::RequestStore;
use super::key::{Identity, RequestKey};
use super::metrics::StoreCounters;
use super::record::Answer;
use crate::error::{Error, Result};
use crate::synthesizer::{Completion, Handle, Job, Queue, Request, Synthesizer};
use crossbeam_channel::{Receiver, Select, TryRecvError, bounded};
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

/// Requests in the queue before the store. Few: callers know better what should go first.
const QUEUE_MAX: usize = 32;

/// Requests that wait for room in the queue of an engine.
const BACKLOG_MAX: usize = 32;

/// Requests that wait for the answer to an equal one.
const JOINED_MAX: usize = 1024;

/// Requests that are looked up before completions are looked for.
const TAKEN_MAX: usize = 64;

/// How long a request stays in the backlog before the engines are tried again.
const RETRY: Duration = Duration::from_millis(1);

/// Puts a store before the engines behind `engines`, which is shared with whoever else holds it. The thread
/// ends when the last [`Queue`] and handle in front are gone and all is answered.
///
/// `failed` is called, once, if the store fails: requests in flight are then never answered.
///
/// # Errors
/// If there can be no thread.
pub fn start(
    engines: &Queue,
    identity: Identity,
    store: Arc<Mutex<RequestStore>>,
    failed: impl FnOnce(Error) + Send + 'static,
) -> Result<(Queue, JoinHandle<()>)> {
    let (queue, jobs) = Queue::new(QUEUE_MAX);
    let (wake, woken) = bounded(1);
    let engines = engines.open(Arc::new(move || {
        let _ = wake.try_send(()); // one wake-up is as good as several
    }));
    let counters = open(&store).counters();
    let mut front = Front {
        jobs,
        woken,
        engines,
        identity,
        store,
        counters,
        backlog: VecDeque::new(),
        under_way: BTreeMap::new(),
        waiting: BTreeMap::new(),
        joined: 0,
        next: 0,
    };
    let thread = std::thread::Builder::new().name("request store".into()).spawn(move || {
        if let Err(error) = front.serve() {
            failed(error);
        }
    });
    let thread = thread.map_err(|error| Error::Stopped(format!("no store thread: {error}")))?;
    Ok((queue, thread))
}

fn open(store: &Mutex<RequestStore>) -> MutexGuard<'_, RequestStore> {
    store.lock().expect("a thread that panics in the store ends the run")
}

struct Front {
    jobs: Receiver<Job>,
    woken: Receiver<()>,
    engines: Handle,
    identity: Identity,
    store: Arc<Mutex<RequestStore>>,
    counters: Arc<StoreCounters>,
    /// Requests that no engine has taken yet.
    backlog: VecDeque<Request>,
    /// By the key that the engines see: in the backlog or at an engine.
    under_way: BTreeMap<u64, RequestKey>,
    /// Who waits for the answer; the first one asked.
    waiting: BTreeMap<RequestKey, Vec<Job>>,
    /// Jobs in `waiting` behind the first of their kind.
    joined: usize,
    next: u64,
}

impl Front {
    /// Answers jobs until their senders are gone and all is answered.
    fn serve(&mut self) -> Result<()> {
        let mut is_open = true;
        while is_open || !self.waiting.is_empty() {
            self.wait(is_open);
            is_open = is_open && self.take();
            self.submit();
            self.settle()?;
        }
        Ok(())
    }

    /// Whether more requests may come in.
    fn has_room(&self) -> bool {
        self.backlog.len() < BACKLOG_MAX && self.joined < JOINED_MAX
    }

    /// Waits until there is something to do.
    fn wait(&self, is_open: bool) {
        let mut select = Select::new();
        select.recv(&self.woken);
        if is_open && self.has_room() {
            select.recv(&self.jobs);
        }
        if self.backlog.is_empty() {
            select.ready();
        } else {
            let _ = select.ready_timeout(RETRY); // whichever it was, all is looked at
        }
        let _ = self.woken.try_recv();
    }

    /// Looks up the requests that are there; false if no more will come.
    fn take(&mut self) -> bool {
        for _ in 0..TAKEN_MAX {
            if !self.has_room() {
                break;
            }
            match self.jobs.try_recv() {
                Ok(job) => self.look_up(job),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
        true
    }

    fn look_up(&mut self, mut job: Job) {
        let key = RequestKey::new(self.identity, &job.request);
        if let Some(jobs) = self.waiting.get_mut(&key) {
            self.counters.joined.fetch_add(1, Relaxed);
            self.joined += 1;
            job.request.tokens = Vec::new(); // those of the first are asked with
            jobs.push(job);
            return;
        }
        let known = open(&self.store).get(&key);
        if let Some(answer) = known {
            self.counters.hits.fetch_add(1, Relaxed);
            let finish = answer.finish();
            return job.complete(answer.tokens, finish);
        }
        self.counters.misses.fetch_add(1, Relaxed);
        self.next += 1;
        let tokens = std::mem::take(&mut job.request.tokens);
        let new_tokens_max = job.request.new_tokens_max;
        self.backlog.push_back(Request { key: self.next, tokens, new_tokens_max });
        self.under_way.insert(self.next, key);
        self.waiting.insert(key, vec![job]);
    }

    /// Gives the engines what they have room for. Those that are full do not keep others from theirs.
    fn submit(&mut self) {
        for _ in 0..self.backlog.len() {
            let Some(request) = self.backlog.pop_front() else { break };
            if let Err(request) = self.engines.submit(request) {
                self.backlog.push_back(request);
            }
        }
    }

    /// Keeps the answers that are there, then gives them to who waits.
    fn settle(&mut self) -> Result<()> {
        let mut answered: Vec<(RequestKey, Completion)> = Vec::new();
        while let Some(completion) = self.engines.poll() {
            let key = self.under_way.remove(&completion.key).expect("engines answer once");
            answered.push((key, completion));
        }
        let answers: Vec<(RequestKey, Answer)> = answered
            .iter()
            .filter_map(|(key, answer)| Some((*key, Answer::new(&answer.tokens, &answer.finish)?)))
            .collect();
        let mut store = open(&self.store);
        if !answers.is_empty() || store.is_behind() {
            store.put(&answers)?;
        }
        drop(store);
        for (key, Completion { key: _, tokens, finish }) in answered {
            let jobs = self.waiting.remove(&key).expect("somebody asked");
            self.joined -= jobs.len() - 1;
            for job in jobs {
                job.complete(tokens.clone(), finish.clone());
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Finish;
    use crate::request_store::BYTES_MIN;
    use crate::synthesizer::Waker;
    use crossbeam_channel::unbounded;
    use std::path::Path;

    const LONG: Duration = Duration::from_secs(60);

    /// A caller that may wait.
    struct Caller {
        handle: Handle,
        woken: Receiver<()>,
        next: u64,
    }

    impl Caller {
        fn new(queue: &Queue) -> Self {
            let (wake, woken) = unbounded();
            let waker: Waker = Arc::new(move || {
                let _ = wake.send(());
            });
            Caller { handle: queue.open(waker), woken, next: 0 }
        }

        /// Asks for the answers to some prompts of a token each, all at a time; they come in any order.
        fn submit(&mut self, prompts: impl IntoIterator<Item = u32>) {
            for prompt in prompts {
                self.next += 1;
                let mut request = Request {
                    key: u64::from(prompt) << 32 | self.next,
                    tokens: vec![prompt],
                    new_tokens_max: 5,
                };
                while let Err(refused) = self.handle.submit(request) {
                    request = refused;
                    std::thread::yield_now();
                }
            }
        }

        fn receive(&mut self) -> Completion {
            loop {
                if let Some(completion) = self.handle.poll() {
                    return completion;
                }
                self.woken.recv_timeout(LONG).expect("an answer comes");
            }
        }

        /// The prompts that answers came to, which must be those of the script.
        fn hear(&mut self, answers: usize) -> Vec<u32> {
            let mut prompts = Vec::new();
            for _ in 0..answers {
                let completion = self.receive();
                let prompt = (completion.key >> 32) as u32;
                assert_eq!((completion.tokens, completion.finish), script(prompt));
                prompts.push(prompt);
            }
            prompts.sort_unstable();
            prompts
        }
    }

    fn script(prompt: u32) -> (Vec<u32>, Finish) {
        match prompt % 10 {
            9 => (Vec::new(), Finish::Failed("nine".into())),
            8 => (vec![prompt; 5], Finish::Length),
            _ => (vec![prompt + 1], Finish::Stop),
        }
    }

    fn answer(job: Job) {
        let (tokens, finish) = script(job.request.tokens[0]);
        job.complete(tokens, finish);
    }

    fn store(folder: &Path) -> Arc<Mutex<RequestStore>> {
        Arc::new(Mutex::new(RequestStore::open(folder, BYTES_MIN).unwrap()))
    }

    fn front(
        engines: &Queue,
        store: &Arc<Mutex<RequestStore>>,
        who: &str,
    ) -> (Queue, JoinHandle<()>) {
        start(engines, Identity::new(who), store.clone(), |error| panic!("{error}")).unwrap()
    }

    fn figures(store: &Mutex<RequestStore>) -> BTreeMap<&'static str, u64> {
        open(store).counters().figures().into()
    }

    #[test]
    fn what_was_answered_once_is_never_asked_again_unless_it_failed() {
        let place = tempfile::tempdir().unwrap();
        let prompts = 0..100;
        for round in 0..3 {
            let store = store(place.path());
            let (engines, jobs) = Queue::new(4);
            let engine = std::thread::spawn(move || {
                let count = |job: Job| {
                    let prompt = job.request.tokens[0];
                    answer(job);
                    prompt
                };
                jobs.iter().map(count).collect::<Vec<u32>>()
            });
            let (queue, thread) = front(&engines, &store, "one");
            drop(engines);
            let mut caller = Caller::new(&queue);
            drop(queue);
            caller.submit(prompts.clone());
            assert_eq!(caller.hear(100), prompts.clone().collect::<Vec<_>>());
            drop(caller);
            thread.join().unwrap();
            let asked = engine.join().unwrap();
            assert_eq!(asked.len(), if round == 0 { 100 } else { 10 });
            assert!(round == 0 || asked.iter().all(|prompt| prompt % 10 == 9));
            let figures = figures(&store);
            assert_eq!(figures["hits"] + figures["misses"], 100);
            assert_eq!((figures["misses"], figures["joined"]), (asked.len() as u64, 0));
            assert_eq!(figures["written"], if round == 0 { 90 } else { 0 });
        }
    }

    #[test]
    fn equal_requests_in_flight_are_generated_once_and_all_answered() {
        let place = tempfile::tempdir().unwrap();
        let store = store(place.path());
        let (engines, jobs) = Queue::new(4);
        let (queue, thread) = front(&engines, &store, "one");
        let mut callers = [Caller::new(&queue), Caller::new(&queue)];
        for caller in &mut callers {
            caller.submit([1, 9, 1, 9]);
        }
        let held = [jobs.recv_timeout(LONG).unwrap(), jobs.recv_timeout(LONG).unwrap()];
        while figures(&store)["joined"] < 6 {
            std::thread::yield_now();
        }
        assert!(jobs.is_empty());
        held.into_iter().for_each(answer);
        for caller in &mut callers {
            assert_eq!(caller.hear(4), [1, 1, 9, 9]);
        }
        drop((callers, queue));
        thread.join().unwrap();
        let figures = figures(&store);
        assert_eq!(["misses", "joined", "written"].map(|name| figures[name]), [2, 6, 1]);
    }

    #[test]
    fn answers_are_on_the_disk_before_they_are_given() {
        let place = tempfile::tempdir().unwrap();
        let store = store(place.path());
        let (engines, jobs) = Queue::new(4);
        let (queue, _) = front(&engines, &store, "one");
        let mut caller = Caller::new(&queue);
        for prompt in 0..8 {
            caller.submit([prompt]);
            answer(jobs.recv_timeout(LONG).unwrap());
            caller.hear(1);
            let copy = tempfile::tempdir().unwrap();
            for (_, path) in crate::request_store::segment_files(place.path()).unwrap() {
                std::fs::copy(&path, copy.path().join(path.file_name().unwrap())).unwrap();
            }
            let after = RequestStore::open(copy.path(), BYTES_MIN).unwrap();
            assert_eq!(after.len() as u32, prompt + 1);
        }
    }

    #[test]
    fn two_synthesizers_share_a_store_and_not_their_answers() {
        let place = tempfile::tempdir().unwrap();
        let store = store(place.path());
        for (who, more) in [("one", 0), ("two", 100), ("one", 0), ("two", 100)] {
            let (engines, jobs) = Queue::new(4);
            let engine = crate::synthesizer::scripted(jobs, 3, move |request| {
                (vec![request.tokens[0] + more], Finish::Stop)
            });
            let (queue, thread) = front(&engines, &store, who);
            drop(engines);
            let mut caller = Caller::new(&queue);
            drop(queue);
            caller.submit(0..20);
            for _ in 0..20 {
                let Completion { key, tokens, .. } = caller.receive();
                assert_eq!(tokens, [(key >> 32) as u32 + more]);
            }
            drop(caller);
            thread.join().unwrap();
            engine.join().unwrap();
        }
        let figures = figures(&store);
        assert_eq!((figures["hits"], figures["misses"]), (40, 40));
    }

    #[test]
    fn an_engine_that_is_full_does_not_keep_others_from_their_requests() {
        let place = tempfile::tempdir().unwrap();
        let store = store(place.path());
        let (lines, engines): (Vec<_>, Vec<_>) = (0..2).map(|_| Queue::new(2)).unzip();
        let (queue, thread) = front(&Queue::over(lines), &store, "one");
        let mut caller = Caller::new(&queue);
        drop(queue);
        // The first engine takes nothing for now; the other answers all that is its own.
        let other = engines[1].clone();
        let working = std::thread::spawn(move || other.iter().map(answer).count());
        caller.submit(0..40);
        let early = caller.hear(10);
        assert_eq!(early.len(), 10);
        let first = engines[0].clone();
        drop(engines);
        let late = std::thread::spawn(move || first.iter().map(answer).count());
        caller.hear(30);
        drop(caller);
        thread.join().unwrap();
        assert_eq!(working.join().unwrap() + late.join().unwrap(), 40);
    }

    #[test]
    fn a_store_that_fails_says_so_and_answers_nothing() {
        let place = tempfile::tempdir().unwrap();
        let store = store(place.path());
        let (engines, jobs) = Queue::new(4);
        let (said, heard) = unbounded();
        let (queue, thread) = start(&engines, Identity::new("one"), store, move |error| {
            said.send(error.to_string()).unwrap();
        })
        .unwrap();
        let mut caller = Caller::new(&queue);
        caller.submit([1]);
        let job = jobs.recv_timeout(LONG).unwrap();
        std::fs::remove_dir_all(place.path()).unwrap();
        answer(job);
        let reason = heard.recv_timeout(LONG).unwrap();
        assert!(reason.contains("answers-00000001.hwlog"), "{reason}");
        thread.join().unwrap();
        assert!(caller.handle.poll().is_none());
    }
}

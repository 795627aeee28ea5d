//! Order, counts and lower bounds of time. Upper bounds belong to benchmarks.

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    thread,
    time::{Duration, Instant},
};

use super::*;

/// A server that sends `down` bytes once it has read everything, and returns what it read.
fn server(down: Vec<u8>, connections: usize) -> (SocketAddr, thread::JoinHandle<Vec<Vec<u8>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let thread = thread::spawn(move || {
        let serve = |mut stream: TcpStream| {
            let mut up = Vec::new();
            stream.read_to_end(&mut up).unwrap();
            stream.write_all(&down).unwrap();
            up
        };
        thread::scope(|scope| {
            let threads: Vec<_> = (0..connections)
                .map(|_| {
                    let (stream, _) = listener.accept().unwrap();
                    scope.spawn(move || serve(stream))
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    });
    (address, thread)
}

fn exchange(address: SocketAddr, up: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(up).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut down = Vec::new();
    stream.read_to_end(&mut down).unwrap();
    down
}

fn pattern(count: usize) -> Vec<u8> {
    (0..=250).cycle().take(count).collect()
}

#[test]
fn bytes_and_order() {
    for slow_start in [false, true] {
        for (rate, delay) in [(0, 0), (0, 3), (50_000_000, 0), (50_000_000, 3), (1_000_000_000, 1)] {
            let (up, down) = (pattern(70_001), pattern(300_007));
            let (address, server) = server(down.clone(), 1);
            let options = LinkOptions { slow_start, ..LinkOptions::symmetric(rate, Duration::from_millis(delay)) };
            let link = Link::start(options, address).unwrap();
            assert!(exchange(link.address(), &up) == down, "{options:?}");
            assert!(server.join().unwrap() == [up], "{options:?}");
            let expected = LinkStatistics { bytes_down: 300_007, bytes_up: 70_001, connections: 1, cut: 0 };
            assert_eq!(link.statistics(), expected);
            link.reset();
            assert_eq!(link.statistics(), LinkStatistics::default());
            link.stop();
        }
    }
}

#[test]
fn takes_its_time() {
    let delay = Duration::from_millis(15);
    let (address, server) = server(pattern(250_000), 4);
    let link = Link::start(LinkOptions::symmetric(40_000_000, delay), address).unwrap();
    let start = Instant::now();
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| assert_eq!(exchange(link.address(), b"x").len(), 250_000));
        }
    });
    // A megabyte at 5 MB/s, less the burst; a round trip for the handshake and one for the question.
    let least = Duration::from_millis(200) - shaper::CREDIT + 4 * delay;
    assert!(start.elapsed() >= least, "{:?}", start.elapsed());
    assert_eq!(server.join().unwrap().len(), 4);
    assert_eq!(link.statistics(), LinkStatistics { bytes_down: 1_000_000, bytes_up: 4, connections: 4, cut: 0 });
}

#[test]
fn slow_start_costs_round_trips() {
    // 14600 bytes, twice that, ...: 100 000 bytes need three round trips, and the first arrival half of one.
    let delay = Duration::from_millis(10);
    let (address, server) = server(pattern(100_000), 1);
    let link = Link::start(LinkOptions::symmetric(0, delay), address).unwrap();
    let start = Instant::now();
    assert_eq!(exchange(link.address(), b"").len(), 100_000);
    assert!(start.elapsed() >= 2 * delay + delay + 2 * delay * 2 + delay, "{:?}", start.elapsed());
    server.join().unwrap();
}

#[test]
fn a_reader_that_stops_stops_the_writer() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let options = LinkOptions::symmetric(100_000_000, Duration::from_millis(1));
    let link = Link::start(options, listener.local_addr().unwrap()).unwrap();
    let client = TcpStream::connect(link.address()).unwrap();
    let (mut server, _) = listener.accept().unwrap();
    server.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    let chunk = vec![0; 64 << 10];
    let mut written = 0;
    while written < 256 << 20 {
        match server.write(&chunk) {
            Ok(count) => written += count,
            Err(_) => break,
        }
    }
    assert!(written < 64 << 20, "{written} bytes were taken for a client that doesn't read");
    drop(client);
    link.stop();
}

#[test]
fn breaks_and_stops() {
    // Nothing listens upstream: the client's connection ends.
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let link = Link::start(LinkOptions::symmetric(0, Duration::ZERO), free).unwrap();
    let mut client = TcpStream::connect(link.address()).unwrap();
    assert!(matches!(client.read(&mut [0; 1]), Ok(0) | Err(_)));
    link.stop();

    // A link that stops takes its connections along.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let link = Link::start(LinkOptions::symmetric(0, Duration::ZERO), listener.local_addr().unwrap()).unwrap();
    let mut client = TcpStream::connect(link.address()).unwrap();
    let (_server, _) = listener.accept().unwrap();
    let address = link.address();
    link.stop();
    assert!(matches!(client.read(&mut [0; 1]), Ok(0) | Err(_)));
    assert!(TcpStream::connect(address).is_err());
}

#[test]
fn jitter_delays_and_keeps_the_order() {
    let options = LinkOptions {
        jitter: Duration::from_millis(8),
        seed: 3,
        ..LinkOptions::symmetric(20_000_000, Duration::from_millis(2))
    };
    let (up, down) = (pattern(30_001), pattern(200_007));
    let (address, server) = server(down.clone(), 1);
    let link = Link::start(options, address).unwrap();
    assert!(exchange(link.address(), &up) == down);
    assert!(server.join().unwrap() == [up]);
}

#[test]
fn a_connection_has_a_rate_of_its_own() {
    let took = |options: LinkOptions, connections: usize| {
        let (address, server) = server(pattern(600_000 / connections), connections);
        let link = Link::start(options, address).unwrap();
        let start = Instant::now();
        thread::scope(|scope| {
            for _ in 0..connections {
                scope.spawn(|| assert_eq!(exchange(link.address(), b"x").len(), 600_000 / connections));
            }
        });
        server.join().unwrap();
        start.elapsed()
    };
    let options = LinkOptions {
        connection_bits_per_second: NonZeroU64::new(16_000_000),
        ..LinkOptions::symmetric(64_000_000, Duration::ZERO)
    };
    // 2 MB/s for one, and 8 MB/s for all of them.
    let (one, four) = (took(options, 1), took(options, 4));
    assert!(one >= Duration::from_millis(300) - shaper::CREDIT, "{one:?}");
    assert!(four >= Duration::from_millis(75) - shaper::CREDIT, "{four:?}");
}

/// Reads as far as a connection goes, and returns how far that was and whether it was cut.
fn read_all(address: SocketAddr) -> (usize, bool) {
    let mut stream = TcpStream::connect(address).unwrap();
    // It may be cut already.
    let _ = stream.shutdown(Shutdown::Write);
    let (mut count, mut buffer) = (0, [0; 4096]);
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return (count, false),
            Ok(more) => count += more,
            Err(error) => {
                assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
                return (count, true);
            }
        }
    }
}

/// A server that sends so many bytes to whoever comes, as far as they are taken. It ends with the process.
fn patient_server(bytes: usize) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let _ = stream.unwrap().write_all(&pattern(bytes));
        }
    });
    address
}

#[test]
fn connections_are_cut_where_they_should_be() {
    let address = patient_server(100_000);
    let cut_at = |cut: Cut, seed: u64| {
        let options = LinkOptions { cut: Some(cut), seed, ..LinkOptions::symmetric(0, Duration::ZERO) };
        let link = Link::start(options, address).unwrap();
        let places: Vec<_> = std::iter::repeat_with(|| read_all(link.address())).take(8).collect();
        let count = places.iter().filter(|(_, is_cut)| *is_cut).count();
        // The client knows before the link has counted.
        let deadline = Instant::now() + Duration::from_secs(10);
        while link.statistics().cut < count as u64 && Instant::now() < deadline {
            thread::yield_now();
        }
        assert_eq!(link.statistics().cut, count as u64);
        places
    };
    for bytes in [0, 1, 50_000, 100_000] {
        assert_eq!(cut_at(Cut::After(bytes as u64), 0), [(bytes, true); 8], "{bytes}");
    }
    assert_eq!(cut_at(Cut::After(100_001), 0), [(100_000, false); 8]);
    let places = cut_at(Cut::About(40_000), 1);
    assert!(places.iter().all(|&(count, is_cut)| is_cut && count <= 80_000), "{places:?}");
    assert!(places.iter().any(|place| *place != places[0]), "{places:?}");
    assert_eq!(cut_at(Cut::About(40_000), 1), places, "chance comes again");
    assert_ne!(cut_at(Cut::About(40_000), 2), places);
}
